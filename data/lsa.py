"""Word vectors by latent semantic analysis: where a small text encoder starts if there are no pretrained weights.

Deerwester, Dumais, Furnas, Landauer, Harshman: "Indexing by Latent Semantic Analysis", JASIS 1990.
"""

from __future__ import annotations

import numpy as np

from data.stream import DataError


def latent_semantic_words(
    ids: np.ndarray, vocab_size: int, features: int, seed: int = 0, ignored: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Word vectors and word weights from the words that documents share.

    Documents are rows ``log(1 + count) * idf`` of unit length; words are the right singular vectors of the largest
    ``features`` singular values.  A document's weighted sum of word vectors is then its latent vector.

    Args:
      ids: int ``[N, L]``, documents as padded word ids.
      vocab_size: V.
      features: d, at most the number of documents.
      seed: of the randomised decomposition.
      ignored: ids below it are special tokens or padding: they get zero vectors.

    Returns:
      Vectors f32 ``[V, d]`` and inverse document frequencies ``log((N + 1) / (n + 1))``, f32 ``[V]``.

    Raises:
      DataError: more features than documents or words.
    """
    from scipy import sparse
    from sklearn.utils.extmath import randomized_svd

    n = len(ids)
    if not 1 <= features <= min(n, vocab_size):
        raise DataError(f"features must be in [1, {min(n, vocab_size)}] for {n} documents, got {features}")
    rows, cols = np.repeat(np.arange(n), ids.shape[1]), ids.ravel()
    real = cols >= ignored
    counts = sparse.csr_matrix((np.ones(real.sum()), (rows[real], cols[real])), (n, vocab_size))
    frequency = np.asarray((counts > 0).sum(0)).ravel()
    idf = np.log((n + 1) / (frequency + 1))
    weighted = counts.log1p().multiply(idf).tocsr()
    length = np.sqrt(np.asarray(weighted.multiply(weighted).sum(1)).ravel())
    weighted = sparse.diags(1 / np.maximum(length, 1e-9)) @ weighted
    vectors = randomized_svd(weighted, features, random_state=seed)[2].T
    vectors[frequency == 0] = 0
    return vectors.astype(np.float32), np.where(frequency > 0, idf, 0).astype(np.float32)
