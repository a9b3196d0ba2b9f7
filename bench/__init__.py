"""The measuring instrument: ``python -m bench``. Timings live here, never in a test.

ops/        what is measured: inputs, plain PyTorch, ours, truth, minimal work; one small file an op
peers/      other packages computing the same; one small file each
measure.py  correctness first, then interleaved turns; clock.py and ceilings.py serve it
whole.py    the fp64 truth at the timed shape, in chunks of rows
worker.py   measures in a process of its own; runner.py keeps the books and survives its crashes
calls.py        the calls of every launcher that lowering.py compiles and sanitize.py runs
covering.py     which of them make test compiles: one binary in nine, and every value of every argument
lowering.py     every kernel compiled without a GPU: registers, spills, machine code
first_light.py  the first four minutes on a GPU, and a dry run of them without one; its parts are in light/
gpu_check.sh    the next seven: tests of a card; sanitize.py and tune.py are stages of it
stub_driver.py  kernels compiled and launched on a machine without a GPU
report.py, compare.py, plots.py   what is done with the result files
"""
