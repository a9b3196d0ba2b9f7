"""late-interaction-kernels: late interaction with its gradient, in Triton.

``maxsim(queries [M, T, D], documents [N, R, D])`` gives sums over the query's words, [M, N]. backward="unified" sums
gradients in fp32; its default may multiply them in half precision.
"""

PACKAGE = "late-interaction-kernels"
DEVICES = ("cuda",)


def interaction():
    from late_interaction_kernels import maxsim

    return lambda problem: maxsim(problem.y, problem.x, backward="unified").mT / problem.y.shape[1]


def scores():
    variant = interaction()
    return lambda problem: (variant(problem),)


VARIANTS = {"late_interaction": interaction, "late_interaction_scores": scores}
