"""What an adapter version makes unnecessary in a user's context."""

from service.domain.fast_weights import FastWeights
from service.domain.slow_weights import AdapterVersion


def absorbed(version: AdapterVersion, state: FastWeights, *, user: str) -> frozenset[str]:
    """Ids of the user's items that the version has absorbed and that were neither said again since nor pinned.

    New support after the version's watermark means that the adapter does not do by itself what the user wants: the item is rendered
    again, until a later version absorbs it. Who pins an item wants to see it in the context.
    """
    watermark, items = version.watermark.get(user, 0), state.items

    def stays_out(name: str) -> bool:
        return name not in items or (items[name].renewed <= watermark and not items[name].pinned)

    return frozenset(name for name in version.report.absorbed if stays_out(name))
