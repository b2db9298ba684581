"""Probes of frozen features: a linear classifier or regressor on top, by scikit-learn."""

from __future__ import annotations

import numpy as np


def linear_probe(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> float:
    """Test accuracy of logistic regression on features standardised by the training split's statistics."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_x.astype(np.float64))
    model = LogisticRegression(max_iter=2000).fit(scaler.transform(train_x), train_y)
    return float(model.score(scaler.transform(test_x), test_y))


def ridge_probe(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, penalty: float = 1e-3) -> np.ndarray:
    """Test predictions of ridge regression on standardised features; ``penalty`` is per training example."""
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_x.astype(np.float64))
    model = Ridge(alpha=penalty * len(train_x)).fit(scaler.transform(train_x), train_y)
    return model.predict(scaler.transform(test_x))
