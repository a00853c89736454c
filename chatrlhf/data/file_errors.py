"""What the system raises about a file, said in one line that names it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chatrlhf.errors import DataError, one_line


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Inside, whatever the system raises about reading a file becomes a DataError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: the file does not exist; correct the path in the configuration") from None
    except IsADirectoryError:
        raise DataError(f"{path}: it is a folder; name the file in it") from None
    except PermissionError:
        raise DataError(f"{path}: it may not be read by this user; change its permissions") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: it cannot be read ({one_line(error)}); copy it again") from None
