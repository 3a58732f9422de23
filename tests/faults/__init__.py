"""Faults, case by case: tests/fault_table.py lists them and prints what they cost."""
