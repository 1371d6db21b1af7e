"""How well images are classified where classes are not equally frequent."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

METRICS = ("balanced_accuracy", "macro_f1", "auc")
"""Beside accuracy: mean over classes of the recall, of F1, of the area under the ROC curve of the class against the
rest."""


def metrics_of(metrics: Iterable[str], labels: Tensor, logits: Tensor) -> dict[str, float]:
    """Some of ``METRICS`` in percent, from labels (n,) and finite logits (n, classes); recall and area are of the
    classes that labels name."""
    from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score  # takes a second to import

    labels, probabilities = labels.numpy(force=True), logits.double().softmax(1).numpy(force=True)
    known, predicted = np.unique(labels), probabilities.argmax(1)
    scores = {
        "balanced_accuracy": lambda: balanced_accuracy_score(labels, predicted),
        "macro_f1": lambda: f1_score(labels, predicted, average="macro"),
        "auc": lambda: roc_auc_score(labels[:, None] == known, probabilities[:, known]),
    }
    return {name: 100 * float(scores[name]()) for name in metrics}
