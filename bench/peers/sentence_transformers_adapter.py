"""Sentence Transformers: training of text embedding models, in plain PyTorch.

``MultipleNegativesRankingLoss`` as its documentation has it for symmetric InfoNCE: directions ``query_to_doc`` and
``doc_to_query``, partition mode ``per_direction``. It is called on the embeddings, without a model. Its scale is a
fixed number, so that it is left at 1, the similarity is the dot product, and the learnable scale multiplies x.

Each direction makes its own N x N matrix. The cached form of the loss goes by chunks of rows, but embeds twice and runs
backward inside its forward pass: it needs a model, and cannot be called on embeddings alone.
"""

PACKAGE = "sentence-transformers"
DEVICES = ("cpu", "cuda")


def info_nce():
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    loss = MultipleNegativesRankingLoss(
        model=None,
        scale=1.0,
        similarity_fct=dot_score,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    return lambda problem: loss.compute_loss_from_embeddings([problem.scale * problem.x, problem.y], labels=None)


VARIANTS = {"info_nce": info_nce}
