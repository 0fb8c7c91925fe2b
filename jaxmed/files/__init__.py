"""One way to files: paths checked first, written whole or not at all, CSV and JSON by one set of rules, arrays with checksums."""

from jaxmed.files.arrays import ArrayLayout, find_damage, open_array
from jaxmed.files.parse import is_number, odd_text, parse_json, parse_yaml
from jaxmed.files.paths import IRREGULAR, PART, TMP, check_file, check_path, is_irregular
from jaxmed.files.seal import check_seal, is_whole, sealed
from jaxmed.files.sums import SUMS, check_sums, file_digest, write_sums
from jaxmed.files.tables import NAME_COLUMNS, Row, read_csv, write_csv
from jaxmed.files.whole import atomic, read_json, read_text, simple, write_json, write_text

__all__ = [
    "IRREGULAR",
    "NAME_COLUMNS",
    "PART",
    "SUMS",
    "TMP",
    "ArrayLayout",
    "Row",
    "atomic",
    "check_file",
    "check_path",
    "check_seal",
    "check_sums",
    "file_digest",
    "find_damage",
    "is_irregular",
    "is_number",
    "is_whole",
    "odd_text",
    "open_array",
    "parse_json",
    "parse_yaml",
    "read_csv",
    "read_json",
    "read_text",
    "sealed",
    "simple",
    "write_csv",
    "write_json",
    "write_sums",
    "write_text",
]
