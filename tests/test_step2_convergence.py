"""Who trained to the end: a rule on training alone, by hand."""

import numpy as np
import pandas as pd
import pytest

from step2.convergence import convergence_lines, convergence_table, perfect_loss, still_learning


def some_history(
    last_losses: dict[str, list[float]], accuracy: float = 1.0, epochs: int = 20
) -> pd.DataFrame:
    """Return the epochs of a run for each loss, which is that of the last tenth of its epochs."""
    rows = []
    for variant, losses in last_losses.items():
        for fold, loss in enumerate(losses, 1):
            for epoch in range(1, epochs + 1):
                fit = {"train_loss": loss if epoch > 0.9 * epochs else 1.7, "train_accuracy": accuracy}
                run = {"variant": variant, "repeat": 1, "fold": fold, "control": False}
                rows.append(run | {"epoch": epoch, "val_loss": 9.0, "val_accuracy": 0.0} | fit)
    return pd.DataFrame(rows)


def test_perfect_loss_by_hand():
    assert perfect_loss(0.0, 6) == 0
    p = 0.9 + 0.1 / 6
    assert perfect_loss(0.1, 6) == pytest.approx(-p * np.log(p) - 5 / 60 * np.log(1 / 60))


@pytest.mark.parametrize(
    ("loss", "accuracy", "converged"), [(0.1, 1.0, True), (0.25, 1.0, False), (0.1, 0.94, False)]
)
def test_a_run_has_converged_where_it_fits_its_training_slices(loss, accuracy, converged):
    """Of log 6 = 1.79, a tenth is 0.179; held-out loss and accuracy, here as bad as can be, don't count."""
    table = convergence_table(some_history({"a": [loss]}, accuracy), 0.0, 6)
    assert table["converged"].tolist() == [converged]
    assert table["loss_left"].iloc[0] == pytest.approx(loss / np.log(6))
    assert still_learning(table) == ([] if converged else ["a"])


def test_a_single_epoch_is_its_own_last_tenth():
    assert len(convergence_table(some_history({"a": [0.1]}, epochs=1), 0.0, 6)) == 1


def test_last_tenth_of_the_epochs_is_averaged():
    history = some_history({"a": [0.1]})
    history.loc[history["epoch"] == 19, "train_loss"] = 0.3
    assert convergence_table(history, 0.0, 6)["train_loss"].tolist() == pytest.approx([0.2])


def test_variant_of_which_half_of_the_runs_have_not_converged_is_still_learning():
    assert still_learning(convergence_table(some_history({"a": [0.1, 0.9]}), 0.0, 6)) == ["a"]


def test_a_run_that_got_stuck_is_named_and_its_variant_has_converged():
    table = convergence_table(some_history({"a": [0.1, 0.9, 0.1], "b": [0.9, 0.9, 0.1]}), 0.0, 6)
    assert table.loc[table["stuck"], ["variant", "fold"]].to_numpy().tolist() == [["a", 2]]
    assert still_learning(table) == ["b"]
    lines = convergence_lines(table)
    assert lines[0].startswith("a: converged (training accuracy 100 %")
    assert lines[1].startswith("b: still learning after 20 epochs")
    assert lines[2] == "a, repeat 1, fold 2 did not converge, most others did"
