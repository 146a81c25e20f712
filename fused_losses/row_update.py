"""Steps of an optimiser on some rows of a table (fused_losses/primitives/row_update)."""

from fused_losses.primitives.row_update.op import (
    adagrad_rows_,
    adamw_rows_,
    catch_up_rows_,
    sgd_rows_,
    state_dtypes,
)

__all__ = ["adagrad_rows_", "adamw_rows_", "catch_up_rows_", "sgd_rows_", "state_dtypes"]
