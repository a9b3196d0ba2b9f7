// The Python module gssf_kernels._C. Importing it loads the library, whose static initialisers register the CPU kernels
// with PyTorch; its one function says which unit this processor has for bf16 products. Built with Py_LIMITED_API
// (setup.py), so that one library serves every Python from 3.10.
#include <Python.h>

#include "bf16.h"

namespace {

PyObject* bf16_unit(PyObject*, PyObject*) {
  switch (gssf::bf16_unit()) {
    case gssf::Bf16Unit::amx:
      return PyUnicode_FromString("amx");
    case gssf::Bf16Unit::avx512_bf16:
      return PyUnicode_FromString("avx512_bf16");
    default:
      return PyUnicode_FromString("none");
  }
}

PyMethodDef methods[] = {{"bf16_unit", bf16_unit, METH_NOARGS, "\"amx\", \"avx512_bf16\" or \"none\"."},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
