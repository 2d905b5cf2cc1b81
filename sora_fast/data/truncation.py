"""Files that end before they should.

Decoders read a clip that was cut off as a shorter one and say nothing, so the sizes that containers state are held
against the file's. Only structure is read, a few bytes of every block; nothing is decoded.
"""

from __future__ import annotations

import mmap
from pathlib import Path

_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"styp", b"free", b"skip", b"wide")


def shortfall(path: Path) -> str:
    """ "truncated: ..." of a file that ends too early, "" of one that is whole or does not say.

    Knows MP4, WebM (Matroska), GIF, PNG, WebP, BMP and JPEG, by content and not by name. A file that is cut exactly
    between two blocks may pass.
    """
    if not path.stat().st_size:
        return ""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            part, end = _promised(data)
        except IndexError:  # it ends within a header
            part, end = "header", len(data) + 1
        return f"truncated: its {part} ends beyond the {len(data):,} bytes it has" if end > len(data) else ""


def _promised(data) -> tuple[str, int]:
    """(a part of the file, the bytes it must have for that part to be whole)."""
    if data[4:8] in _BOXES:
        return _boxes(data)
    if data[:4] == b"\x1aE\xdf\xa3":
        return "segment", _matroska(data)
    if data[:4] == b"GIF8":
        return "last block", _gif(data)
    if data[:4] == b"\x89PNG":
        return "last chunk", _png(data)
    if data[:4] == b"RIFF":
        return "picture", 8 + int.from_bytes(data[4:8], "little")
    if data[:2] == b"BM":
        return "picture", int.from_bytes(data[2:6], "little")
    if data[:3] == b"\xff\xd8\xff":
        return "picture", len(data) + (data.rfind(b"\xff\xd9") < 0)  # its end marker
    return "", 0


def _boxes(data) -> tuple[str, int]:
    """MP4 (ISO/IEC 14496-12, 4.2): boxes of size, type and contents; size 1: 64 bits follow, 0: to the end."""
    place, indexed = 0, False
    while place + 8 <= len(data):
        kind, size = data[place + 4 : place + 8], int.from_bytes(data[place : place + 4], "big")
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size < 8:
            break
        # What follows an index is told by the index itself, and many a writer leaves other bytes at the end.
        if place + size > len(data) and (kind in (b"ftyp", b"moov", b"moof") or (kind == b"mdat" and not indexed)):
            return f"{kind.decode()} box", place + size
        indexed = indexed or kind == b"moov"
        place += size
    return "", 0


def _matroska(data) -> int:
    """EBML (RFC 8794, 4 and 5): the header and, behind it, the segment; one of unknown size promises nothing."""

    def number(place: int) -> tuple[int, int]:
        """(a variable-size integer, or -1 for an unknown one; the place behind it)."""
        length = 9 - data[place].bit_length()
        if length > 8 or place + length > len(data):
            raise IndexError
        value = int.from_bytes(data[place : place + length], "big") & ((1 << 7 * length) - 1)
        return (-1 if value == (1 << 7 * length) - 1 else value), place + length

    size, place = number(4)
    place += max(size, 0)
    if data[place : place + 4] != b"\x18S\x80g":
        return place + 1 if place >= len(data) else 0
    size, place = number(place + 4)
    return place + max(size, 0)


def _gif(data) -> int:
    """GIF89a, 17 to 27. A missing trailer alone costs no picture and is let pass."""

    def colours(flags: int) -> int:
        return 6 << (flags & 7) if flags & 0x80 else 0

    place = 13 + colours(data[10])
    while place < len(data) and data[place] in b"\x21\x2c":  # an extension, or an image with its code size
        place += 2 if data[place] == 0x21 else 11 + colours(data[place + 9])
        while place < len(data) and data[place]:  # sub-blocks, up to an empty one
            place += 1 + data[place]
        place += 1
    return place


def _png(data) -> int:
    """PNG, 5.3: chunks of length, type, contents and checksum."""
    place = 8
    while place + 8 <= len(data):
        size = 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] == b"IEND":
            return place + size
        place += size
    return max(place, len(data) + 1)
