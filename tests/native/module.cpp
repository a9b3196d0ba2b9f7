// The module `internals`: what of csrc is behind the ops, for the tests of this folder, which say what is right.
#include "bindings.h"

PYBIND11_MODULE(internals, internals) {
  bind_epilogues(internals);
  bind_search(internals);
  bind_row_kernels(internals);
  bind_passes(internals);
  bind_products(internals);
  bind_certified(internals);
  bind_hopper_layout(internals);
  bind_emulator(internals);
}
