"""What is said of a dataset that nothing can be learnt from, or that cannot be judged."""

import pytest

from torchdlrm.cli.preprocess import about_constant_label


def manifest_with(small_dataset, clicks):
    """A manifest whose splits have this share of clicks."""
    splits = small_dataset.manifest.splits
    changed = {
        name: part.model_copy(update={"clicks": round(part.rows * clicks.get(name, 0.25))})
        for name, part in splits.items()
    }
    return small_dataset.manifest.model_copy(update={"splits": changed})


@pytest.mark.parametrize(
    ("clicks", "told"),
    [
        ({"val": 0}, "the label 'label' is 0 in all rows of val: AUC and normalised entropy are undefined there;"),
        (
            {"train": 0, "val": 1, "test": 1},
            "the label 'label' is 0 in all rows of train, 1 in all rows of val and test: nothing can be learnt,",
        ),
    ],
)
def test_a_split_with_one_label_is_told_with_what_follows(clicks, told, small_dataset):
    assert about_constant_label(manifest_with(small_dataset, clicks)).startswith(told)


def test_splits_with_both_labels_or_without_rows_are_not_told_of(small_dataset):
    manifest = manifest_with(small_dataset, {})
    assert about_constant_label(manifest) == ""
    empty = manifest.splits["test"].model_copy(update={"rows": 0, "clicks": 0})
    assert about_constant_label(manifest.model_copy(update={"splits": manifest.splits | {"test": empty}})) == ""
