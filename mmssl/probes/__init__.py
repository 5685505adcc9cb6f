"""Probes of frozen features: what they are worth to something simple that is fitted on them."""

from mmssl.probes.base import Points, Protocol, Task, quantities
from mmssl.probes.clusters import clustering
from mmssl.probes.episodic import episodes
from mmssl.probes.kernels import FOLDS, kernel_ridge, svm, svm_standardized
from mmssl.probes.linear_models import default_protocols, few_shot, linear, linear_probe, linear_svm, low_label
from mmssl.probes.neighbors import knn, knn_weighted
from mmssl.probes.nodes import planetoid, planetoid_normalized
from mmssl.probes.nonlinear import boosting, mlp
from mmssl.probes.ranking import retrieval
from mmssl.probes.trained_heads import attentive, weighted_layers

PROTOCOLS: dict[str, Protocol] = {
    "knn": knn,
    "linear": linear,
    "few_shot": few_shot,
    "knn_weighted": knn_weighted,
    "linear_svm": linear_svm,
    "low_label": low_label,
    "episodes": episodes,
    "retrieval": retrieval,
    "clustering": clustering,
    "attentive": attentive,
    "weighted_layers": weighted_layers,
    "mlp": mlp,
    "kernel_ridge": kernel_ridge,
    "boosting": boosting,
    "svm": svm,
    "svm_standardized": svm_standardized,
    "planetoid": planetoid,
    "planetoid_normalized": planetoid_normalized,
}
RAW_ONLY = ("boosting",)  # a baseline on columns as they are: trees do not read embeddings well
CROSS_VALIDATED = ("svm", "svm_standardized")  # test all labels, each once
UNFITTED = ("episodes", "retrieval", "clustering")  # fit nothing on the training samples
# What a protocol reads, if not the pooled output (n, F): "layers", the pooled output of each layer, (n, layers, F);
# "tokens", the output for each token, (n, tokens, F), NaN where there is none.
READS: dict[str, str] = {"attentive": "tokens", "weighted_layers": "layers"}

__all__ = [
    "CROSS_VALIDATED",
    "FOLDS",
    "PROTOCOLS",
    "RAW_ONLY",
    "READS",
    "UNFITTED",
    "Points",
    "Protocol",
    "Task",
    "default_protocols",
    "linear_probe",
    "quantities",
]
