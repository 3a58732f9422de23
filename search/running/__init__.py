"""Running a study: its problem, its workers, stopping candidates early."""
