"""A study read back: board, tables, pictures, page, comparison."""
