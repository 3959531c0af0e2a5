"""What became of each block of 4 KiB of a disk that can be written to: a map in memory. Pure.

One byte a block, in pages of 4,096 blocks (16 MiB of disk). A page that is not there is all POINT'S; one that is all
ZERO takes no memory of its own. A page as bytes is also the form in which the map is kept in a file (scratch.py).

Looking is allowed beside one thread that changes something: a look meets the old or the new state of each block.
"""

from collections.abc import Iterator

from backupfs.units import KiB

BLOCK = 4 * KiB
PAGE = 4096  # blocks, and bytes of the map

POINTS, WRITTEN, ZERO = 0, 1, 2
"""The block is as the point has it; its bytes are in the data file; it reads as zeroes."""
_ALONE = tuple(bytes([state]) for state in (POINTS, WRITTEN, ZERO))
_ALL_ZERO = bytes([ZERO]) * PAGE


class BlockMap:
    """The states of the blocks of a disk.

    Args:
        size: of the disk, bytes; its last block may be short.
    """

    def __init__(self, size: int) -> None:
        self.blocks = -(-size // BLOCK)
        self.pages = -(-self.blocks // PAGE)
        self._pages: dict[int, bytes | bytearray] = {}
        self._changed: set[int] = set()

    def state(self, block: int) -> int:
        """Return the state of one block."""
        page = self._pages.get(block // PAGE)
        return POINTS if page is None else page[block % PAGE]

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Cover a range of the disk with (state, offset, end) in bytes, in order; neighbours differ in state."""
        end = offset + length
        block, last = offset // BLOCK, -(-end // BLOCK)
        held, begin = -1, offset
        while block < last:
            number, first = divmod(block, PAGE)
            page = self._pages.get(number)
            state, count = POINTS, min(PAGE - first, last - block)
            if page is not None:
                part = bytes(page[first : first + count])  # a copy: what changes meanwhile does not move the border
                state = part[0]
                count -= len(part.lstrip(_ALONE[state]))
            if state != held:
                if held >= 0:
                    yield held, begin, block * BLOCK
                held, begin = state, max(block * BLOCK, offset)
            block += count
        if held >= 0:
            yield held, begin, end

    def set(self, first: int, end: int, state: int) -> None:
        """Set the blocks from `first` to before `end`. By one thread at a time."""
        while first < end:
            number, begin = divmod(first, PAGE)
            count = min(PAGE - begin, end - first)
            page = self._pages.get(number)
            if state == ZERO and count == PAGE:
                self._pages[number] = _ALL_ZERO
            elif isinstance(page, bytearray):
                page[begin : begin + count] = _ALONE[state] * count
            else:
                content = bytearray(page or PAGE)
                content[begin : begin + count] = _ALONE[state] * count
                self._pages[number] = content
            self._changed.add(number)
            first += count

    def take_changed(self) -> dict[int, bytes]:
        """Return the pages that changed since the last call, by number, as they are now."""
        changed = {number: bytes(self._pages[number]) for number in sorted(self._changed)}
        self._changed.clear()
        return changed

    def give_back(self, changed: dict[int, bytes]) -> None:
        """Have pages that were taken count as changed again."""
        self._changed.update(changed)

    def load(self, number: int, page: bytes) -> bool:
        """Take a page that was kept. Returns whether it can be one; if not, nothing is changed."""
        beyond = max((number + 1) * PAGE - self.blocks, 0)
        if len(page) != PAGE or page.translate(None, b"".join(_ALONE)) or any(page[PAGE - beyond :]):
            return False
        if any(page):
            self._pages[number] = _ALL_ZERO if page == _ALL_ZERO else bytearray(page)
        return True
