"""Networks and trees."""

from sklearn.base import BaseEstimator
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from mmssl.probes.base import Points, Task, fit_best, graded, quantities


def mlp(task: Task) -> Points:
    """A network of one hidden layer of 256 on standardised features, stopped early on a tenth of its training data.

    Its weight decay is chosen; quantities are standardised as the features are.
    """
    options = {"hidden_layer_sizes": (256,), "early_stopping": True, "random_state": 0}
    network: BaseEstimator = MLPClassifier(**options)
    name = "probe__alpha"
    if quantities(task.train_labels):
        network = TransformedTargetRegressor(MLPRegressor(**options), transformer=StandardScaler())
        name = "probe__regressor__alpha"
    pipeline = Pipeline([("scale", StandardScaler()), ("probe", network)])
    best = fit_best(pipeline, {name: [1e-4, 1e-1]}, task.train, task.train_labels, validation=task.validation)
    return graded(best.predict(task.test), task)


def boosting(task: Task) -> Points:
    """Gradient boosting of trees by histograms, stopped early on a tenth of its training data: for raw columns."""
    kind = HistGradientBoostingRegressor if quantities(task.train_labels) else HistGradientBoostingClassifier
    trees = kind(max_iter=500, early_stopping=True, random_state=0)
    grid = {"learning_rate": [0.05, 0.1], "max_leaf_nodes": [15, 31]}
    best = fit_best(trees, grid, task.train, task.train_labels, validation=task.validation)
    return graded(best.predict(task.test), task)
