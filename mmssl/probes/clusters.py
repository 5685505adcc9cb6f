"""Whether features fall into the classes by themselves."""

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.preprocessing import StandardScaler

from mmssl.probes.base import Points, Task, needs_classes


def clustering(task: Task) -> Points:
    """k-means of standardised test features, best of ten starts, beside the classes: NMI and ARI.

    There are as many clusters as classes, which is all that is known of the labels. NMI is the mutual information over
    the mean of both entropies; ARI is adjusted for chance (Hubert and Arabie, 1985), which NMI is not. Both are one
    number of all samples, so rows are not compared in pairs.
    """
    labels = task.test_labels
    needs_classes(labels)
    means = KMeans(len(np.unique(labels)), n_init=10, random_state=0)
    clusters = means.fit_predict(StandardScaler().fit_transform(task.test))
    scores = {"NMI": normalized_mutual_info_score(labels, clusters), "ARI": adjusted_rand_score(labels, clusters)}
    return {metric: np.array([score]) for metric, score in scores.items()}
