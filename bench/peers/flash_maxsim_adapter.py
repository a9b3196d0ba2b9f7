"""flash-maxsim: late interaction with its gradient, in Triton.

``flash_maxsim_batched_train(queries [M, T, D], documents [N, R, D])`` gives sums over the query's words, [M, N].
"""

PACKAGE = "flash-maxsim"
DEVICES = ("cuda",)


def interaction():
    from flash_maxsim import flash_maxsim_batched_train

    return lambda problem: flash_maxsim_batched_train(problem.y, problem.x).mT / problem.y.shape[1]


def scores():
    variant = interaction()
    return lambda problem: (variant(problem),)


VARIANTS = {"late_interaction": interaction, "late_interaction_scores": scores}
