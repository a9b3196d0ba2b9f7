// The Python module gssf_kernels._C. Importing it loads the library, whose static initialisers
// register the CPU kernels with PyTorch; it has no members of its own.
// Built with Py_LIMITED_API (setup.py), so that one library serves every Python from 3.10.
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
