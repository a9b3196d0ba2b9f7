from planting import Fault

EDGES = "gssf_kernels/ops/edges.py"
LOSS = "gssf_kernels/losses/graph_pattern.py"
NEGATIVES = "ops/test_negatives"

FAULTS = [
    Fault(
        "edges: a column's negative belongs to the right node",
        EDGES,
        "_gradients",
        "(left, col_index)",
        "(right, col_index)",
    ),
    Fault(
        "edges: a row's negative belongs to the left node",
        EDGES,
        "_gradients",
        "(right, row_index)",
        "(left, row_index)",
    ),
    Fault(
        "graph: weights are squared",
        LOSS,
        "graph_pattern_loss",
        "* terms\n",
        "* terms * weights[:, None].to(terms.dtype)\n",
    ),
    Fault(
        "graph: margins of edges are taken away",
        LOSS,
        "graph_pattern_loss",
        "positive - (margins",
        "positive + (margins",
    ),
    Fault(
        "graph: the mean is over one edge's terms too little",
        LOSS,
        "_total",
        "total * edges.shape[0]",
        "total * (edges.shape[0] - 1)",
    ),
    Fault(
        "C++: every edge starts at the left node",
        "csrc/hardest.cpp",
        "hardest_of_edges",
        "right = ends[2 * e + 1]",
        "right = ends[2 * e]",
        NEGATIVES,
    ),
    Fault(
        "Triton: limits are those of the slab's first edge",
        "gssf_kernels/triton/hardest.py",
        "edge_tile",
        "(first // edge_blocks + edge) * N",
        "(first // edge_blocks + 0 * edge) * N",
        NEGATIVES,
    ),
    Fault(
        "Triton: the right node is the left one",
        "gssf_kernels/triton/sweep.py",
        "reduce_tile",
        "tl.load(nodes + 2 * edge + 1)",
        "tl.load(nodes + 2 * edge)",
        NEGATIVES,
    ),
    Fault(
        "Triton: columns of edges are merged into the first",
        "gssf_kernels/triton/reductions.py",
        "merge_kernel",
        "col_results[0] + k * strides[3]",
        "col_results[0] + 0 * k",
        NEGATIVES,
    ),
]
