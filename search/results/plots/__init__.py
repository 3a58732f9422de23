"""The pictures of a study, one file each. They take a `Board` (or outcomes) and return a matplotlib `Figure`.

No pyplot and no display: nothing global is touched, and the same board gives the same bytes (`style.render`).
Colours mean the same everywhere: blue `pre`, vermilion `post`, green the front, grey what is dominated.
"""
