"""Few-shot episodes: many small tasks of few classes each."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from mmssl.probes.base import Points, Task, needs_classes

EPISODES, WAYS, SHOTS, QUERIES = 600, 5, (1, 5), 15


def episodes(task: Task) -> Points:
    """600 episodes of five test classes, one or five labels each: logistic regression on features of length 1.

    The probe of Tian et al. (2020), with C = 1. In an episode five classes are drawn, of each one its labelled samples
    and up to 15 others that are asked for, all without replacement; the score is the accuracy on these. Which ones, the
    number of the episode says: they are the same for every row. Nothing is fitted on training data. Classes with no
    sample to ask for beside the labelled ones are left out; where less than five are left, an episode has all of them,
    and the metric's name says how many, as in "3-way 1-shot".

    Raises:
        ValueError: less than two classes are left.
    """
    needs_classes(task.test_labels)
    features = normalize(task.test)
    classes, counts = np.unique(task.test_labels, return_counts=True)
    points: Points = {}
    for shots in SHOTS:
        groups = [np.flatnonzero(task.test_labels == label) for label in classes[counts > shots]]
        if len(groups) < 2:
            raise ValueError(
                f"found {len(groups)} of {len(classes)} classes with {shots + 1} test samples or more (the largest has "
                f"{counts.max()}); expected two at least: {shots}-shot episodes need {shots} and one to ask for"
            )
        accuracies = np.empty(EPISODES)
        for number in range(EPISODES):
            support, query = drawn(groups, shots, number)
            probe = LogisticRegression().fit(features[support], task.test_labels[support])
            accuracies[number] = probe.score(features[query], task.test_labels[query])
        points[f"{min(WAYS, len(groups))}-way {shots}-shot"] = accuracies
    return points


def drawn(groups: list[np.ndarray], shots: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of what is labelled and of what is asked for in an episode; ``groups`` are those of each class."""
    rng = np.random.default_rng([shots, number])
    chosen = rng.choice(len(groups), min(WAYS, len(groups)), replace=False)
    orders = [rng.permutation(groups[one]) for one in chosen]
    return (
        np.concatenate([order[:shots] for order in orders]),
        np.concatenate([order[shots : shots + QUERIES] for order in orders]),
    )
