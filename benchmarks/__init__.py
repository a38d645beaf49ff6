"""Programs that measure, each into one record: `python -m benchmarks.speed` and so on (README.md).

They use what users can use, nothing private; the book reads their records and nothing else.
"""

from pathlib import Path

RECORDS = Path(__file__).parent / "records"
FIGURES = Path(__file__).parent / "figures"
