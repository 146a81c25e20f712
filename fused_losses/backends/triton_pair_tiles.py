"""Tile sizes of the Triton kernels over pairs, per architecture, each with what it compiles to."""

from __future__ import annotations

from dataclasses import replace

from fused_losses.backends.triton_tiles import ALL, TABLES, Table, Tile, _same, _wide


def _table(arch: str, **kernels: dict[str, Tile]) -> Table:
    tiles = {(kernel, p): tile for kernel, row in kernels.items() for p, tile in row.items()}
    return replace(TABLES[arch], tiles=tiles)


WIDE, TALL, SMALL, SLIM = Tile(128, 128, 64), Tile(128, 64, 64), Tile(64, 64, 64), Tile(64, 32, 64)


def _by_products(half: Tile, tf32: Tile, tf32x3: Tile) -> dict[str, Tile]:
    """float32 in memory takes half the depth."""
    return _wide(half, replace(tf32, depth=32), replace(tf32x3, depth=32))


def _amd(tile: Tile) -> dict[str, Tile]:
    return _same(replace(tile, depth=32, stages=2), *ALL)


PAIR_TABLES = {
    "sm_80": _table(
        "sm_80",
        statistics=_by_products(TALL, TALL, SMALL),
        statistics_extra=_by_products(TALL, SMALL, SMALL),
        statistics_two=_by_products(TALL, SMALL, SMALL),
        statistics_two_extra=_by_products(SMALL, SMALL, SLIM),
        gradient=_by_products(TALL, TALL, SMALL),
        gradient_extra=_by_products(SMALL, SMALL, SMALL),
        gradient_two=_by_products(TALL, SMALL, SMALL),
        gradient_two_extra=_by_products(SMALL, SLIM, SLIM),
        attention=_by_products(TALL, TALL, SMALL),
        attention_extra=_by_products(TALL, SMALL, SMALL),
        attention_gradient=_by_products(SMALL, SMALL, SLIM),
        attention_gradient_extra=_by_products(SMALL, SLIM, SLIM),
    ),
    "sm_90": _table(
        "sm_90",
        statistics=_by_products(WIDE, TALL, TALL),
        statistics_extra=_by_products(TALL, SMALL, SMALL),
        statistics_two=_by_products(TALL, SMALL, SMALL),
        statistics_two_extra=_by_products(SMALL, SMALL, SMALL),
        gradient=_by_products(TALL, TALL, TALL),
        gradient_extra=_by_products(TALL, SMALL, SMALL),
        gradient_two=_by_products(TALL, SMALL, SMALL),
        gradient_two_extra=_by_products(SMALL, SLIM, SLIM),
        attention=_by_products(WIDE, TALL, TALL),
        attention_extra=_by_products(TALL, SMALL, SMALL),
        attention_gradient=_by_products(SMALL, SMALL, SMALL),
        attention_gradient_extra=_by_products(SMALL, SMALL, SMALL),
    ),
    "sm_100": _table(
        "sm_100",
        statistics=_by_products(TALL, TALL, SMALL),
        statistics_extra=_by_products(SLIM, SLIM, SLIM),
        statistics_two=_by_products(SMALL, SMALL, SMALL),
        statistics_two_extra=_by_products(SLIM, SMALL, SLIM),
        gradient=_by_products(TALL, TALL, SMALL),
        gradient_extra=_by_products(SLIM, SLIM, SLIM),
        gradient_two=_by_products(SMALL, SMALL, SMALL),
        gradient_two_extra=_by_products(SLIM, SLIM, SLIM),
        attention=_by_products(TALL, TALL, SMALL),
        attention_extra=_by_products(SMALL, SMALL, SMALL),
        attention_gradient=_by_products(TALL, SMALL, SMALL),
        attention_gradient_extra=_wide(SMALL, SMALL, replace(SLIM, depth=32)),
    ),
    "gfx942": _table(
        "gfx942",
        statistics=_amd(TALL),
        statistics_extra=_amd(TALL),
        statistics_two=_amd(TALL),
        statistics_two_extra=_amd(TALL),
        gradient=_amd(TALL),
        gradient_extra=_amd(TALL),
        gradient_two=_amd(TALL),
        # wider tiles use matrix instructions of 32 columns, and spill
        gradient_two_extra=_amd(Tile(128, 16, 64)),
        attention=_amd(TALL),
        attention_extra=_amd(TALL),
        attention_gradient=_amd(TALL),
        attention_gradient_extra=_amd(TALL),
    ),
    # small and unequal, so that a few dozen rows and columns make several ragged tiles of each
    "interpret": _table(
        "interpret",
        **{
            f"{kernel}{extra}": _same(tile, *ALL)
            for kernel in ("statistics", "gradient", "attention", "attention_gradient")
            for extra, tile in (
                ("", Tile(16, 32, 16)),
                ("_extra", Tile(32, 16, 16)),
                ("_two", Tile(16, 32, 16)),
                ("_two_extra", Tile(32, 16, 16)),
            )
        },
    ),
}
