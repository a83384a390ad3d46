"""Blank the code in a shared library that is never executed, so that the library compresses to a fraction.

No byte moves: addresses, symbols and relocations stay valid.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

CONTAINER_MAGIC = 0xBA55ED50
"""Begins the device code of one source file. Its header: magic, version, header bytes, bytes behind it."""
CONTAINER_HEADER = struct.Struct("<IHHQ")
IMAGE_HEADER = struct.Struct("<HHIQIIII")
"""Begins an image: kind, version, header bytes, bytes behind it, compressed bytes, two unknown words, architecture."""
ALIGNMENT = 8
IS_COMPRESSED = 0xF000
"""Flags of an image, at byte 40 of its header; byte 56 has the size before compression."""
STUB = (
    struct.pack("<4s5B7xHHI16xQIHHHHHH", b"\x7fELF", 2, 1, 1, 0x41, 8, 2, 190, 1, 64, 0x4005004, 64, 56, 0, 64, 2, 1)
    + bytes(64)
    + struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, 192, 16, 0, 0, 1, 0)
    + b"\0.shstrtab".ljust(16, b"\0")
)
"""What is left of an image for another architecture: an ELF file of its section names alone."""
DYNAMIC = struct.Struct("<QQ")
"""An entry of the section that the loader reads: tag and value."""
DT_INIT_ARRAY, DT_FINI_ARRAY, DT_INIT_ARRAYSZ = 25, 26, 27
BREAKPOINT = b"\xcc"
"""An x86 instruction that ends the process with SIGTRAP: blanked code that is executed after all is noticed at once."""
PAGE = 4096
BLOCK = 1 << 16
"""Bytes of a hole in a file."""


class Image(NamedTuple):
    """Device code for one architecture."""

    begin: int
    header_bytes: int
    payload_bytes: int
    architecture: int
    """90 for sm_90 and sm_90a."""

    @property
    def end(self) -> int:
        """Offset behind it."""
        return self.begin + self.header_bytes + self.payload_bytes


class Container(NamedTuple):
    """The device code of one source file."""

    begin: int
    header_bytes: int
    images: list[Image]


def write(library: bytes | bytearray, path: Path) -> None:
    """Write a new file whose blank blocks take no space on the disk."""
    blank = bytes(BLOCK)
    with path.open("wb") as file:
        for begin in range(0, len(library), BLOCK):
            if (block := library[begin : begin + BLOCK]) != blank:
                file.seek(begin)
                file.write(block)
        file.truncate(len(library))


def section(library: bytes | bytearray, name: bytes) -> tuple[int, int] | None:
    """Offset and size of a section of a 64-bit little-endian ELF file; None: there is no such section."""
    (table,) = struct.unpack_from("<Q", library, 40)
    count, of_names = struct.unpack_from("<HH", library, 60)
    rows = [struct.unpack_from("<IIQQQQIIQQ", library, table + 64 * index) for index in range(count)]
    for row in rows:
        begin = rows[of_names][4] + row[0]
        if library[begin : begin + len(name) + 1] == name + b"\0":
            return row[4], row[5]
    return None


def remove_constructors(library: bytearray) -> tuple[int, int, int]:
    """Make the loader skip the constructors of a library.

    Returns:
        Address of their list, their number, and the address of the list of destructors.
    """
    offset, size = section(library, b".dynamic") or (0, 0)
    tags = {}
    for at in range(offset, offset + size, DYNAMIC.size):
        tag, value = DYNAMIC.unpack_from(library, at)
        tags[tag] = value
        if tag == DT_INIT_ARRAYSZ:
            DYNAMIC.pack_into(library, at, tag, 0)
    return tags[DT_INIT_ARRAY], tags[DT_INIT_ARRAYSZ] // 8, tags[DT_FINI_ARRAY]


def containers(library: bytes | bytearray) -> Iterator[Container]:
    """The containers of device code of a library, in order.

    Raises:
        ValueError: the section holds something else.
    """
    offset, size = section(library, b".nv_fatbin") or (0, 0)
    end = offset + size
    while offset < end:
        magic, _, header_bytes, size = CONTAINER_HEADER.unpack_from(library, offset)
        if magic == 0:  # padding, or what slimming has left
            offset += ALIGNMENT
            continue
        if magic != CONTAINER_MAGIC:
            raise ValueError(f"offset {offset:#x} of .nv_fatbin: found {magic:#x} where a container begins")
        images, begin = [], offset + header_bytes
        while begin < offset + header_bytes + size:
            _, _, image_header, payload, *_, architecture = IMAGE_HEADER.unpack_from(library, begin)
            images.append(Image(begin, image_header, payload, architecture))
            begin = images[-1].end
        yield Container(offset, header_bytes, images)
        offset += header_bytes + size


def keep_device_code(library: bytearray, architecture: int, is_kept: Sequence[bool]) -> None:
    """Leave the images of one architecture in the containers that are kept.

    In the others, the header of an image for another architecture remains: a launch then fails with "no kernel image is
    available for execution on the device", as with any library that was not built for the device.

    Args:
        library: changed in place.
        architecture: 90 for sm_90.
        is_kept: one value per container.

    Raises:
        ValueError: a container has no image for the architecture, or no image for another one.
    """
    for container, kept in zip(list(containers(library)), is_kept, strict=True):
        images = [image for image in container.images if (image.architecture == architecture) == kept]
        if not images:
            raise ValueError(f"the container at {container.begin:#x} has no image that could remain")
        remaining = b"".join(
            bytes(library[image.begin : image.end]) if kept else _stub(library, image) for image in images
        )
        if not kept:
            remaining = _stub(library, images[0])
        begin = container.begin + container.header_bytes
        library[begin : container.images[-1].end] = remaining.ljust(container.images[-1].end - begin, b"\0")
        struct.pack_into("<Q", library, container.begin + 8, len(remaining))


def _stub(library: bytearray, image: Image) -> bytes:
    """An image that says its architecture and has no code."""
    header = bytearray(library[image.begin : image.begin + image.header_bytes])
    struct.pack_into("<QI", header, 8, len(STUB), 0)
    (flags,) = struct.unpack_from("<Q", header, 40)
    struct.pack_into("<Q8xQ", header, 40, flags & ~IS_COMPRESSED, 0)
    return bytes(header) + STUB


def keep_pages(library: bytearray, begin: int, is_kept: Callable[[int], bool]) -> int:
    """Blank pages of the section of machine code, and return how many.

    Args:
        library: changed in place.
        begin: offset of page 0.
        is_kept: by the number of the page. Pages that the section fills in part are never blanked.
    """
    offset, size = section(library, b".text") or (0, 0)
    pages = range(-(-(offset - begin) // PAGE), (offset + size - begin) // PAGE)
    blanked = [page for page in pages if not is_kept(page)]
    for page in blanked:
        library[begin + PAGE * page : begin + PAGE * (page + 1)] = PAGE * BREAKPOINT
    return len(blanked)
