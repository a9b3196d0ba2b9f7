// What the sources of the module `internals` share: how arrays come from NumPy. conftest.py compiles this header once
// for all of them.
//
// Arrays are never converted on their way: one of the wrong dtype, size or layout is an error that names it, because a
// silent copy would hide what a kernel writes, and where.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

// NumPy has no bf16: its bits come as uint16.
template <>
struct pybind11::detail::npy_format_descriptor<c10::BFloat16> {
  static constexpr auto name = const_name("bits of bfloat16");
  static pybind11::dtype dtype() { return pybind11::dtype("uint16"); }
};

template <>
struct pybind11::detail::npy_format_descriptor<c10::Half> {
  static constexpr auto name = const_name("float16");
  static pybind11::dtype dtype() { return pybind11::dtype("float16"); }
};

inline void expect(bool right, const std::string& message) {
  if (!right) throw py::value_error(message);
}

template <class T>
bool is_of(const py::array& x) {
  return x.dtype().equal(py::dtype::of<T>());
}

// f(T()) for the one of Types that x is of.
template <class... Types, class F>
py::object with_dtype(const char* name, const py::array& x, F f) {
  py::object result;
  const bool called = ((is_of<Types>(x) && (result = f(Types()), true)) || ...);
  if (!called) throw py::type_error(std::string(name) + ": no kernel takes this dtype");
  return result;
}

// The numbers of x: of T, adjacent in C order, exactly (or, with `or_more`, at least) `count`.
template <class T>
const T* read(const char* name, const py::array& x, int64_t count, bool or_more = false) {
  expect(is_of<T>(x), std::string(name) + ": of another dtype than the kernel's");
  expect((x.flags() & py::array::c_style) != 0, std::string(name) + ": not contiguous");
  expect(x.size() == count || (or_more && x.size() > count),
         std::string(name) + ": expected " + std::to_string(count) + " numbers, got " + std::to_string(x.size()));
  return static_cast<const T*>(x.data());
}

template <class T>
T* written(const char* name, py::array& x, int64_t count) {
  expect(x.writeable(), std::string(name) + ": not writeable");
  return const_cast<T*>(read<T>(name, x, count));
}

// As read(), or null where there is none.
template <class T>
const T* read(const char* name, const std::optional<py::array>& x, int64_t count) {
  return x ? read<T>(name, *x, count) : nullptr;
}

template <class T>
py::array_t<T> array(const T* values, int64_t count) {
  return py::array_t<T>(count, values);
}

template <class T>
py::array_t<T> array(const std::vector<T>& values) {
  return py::array_t<T>(values.size(), values.data());
}

// What each source adds to the module. Kernels that exist once per instruction set go into its submodule of that name.
void bind_epilogues(py::module_& internals);
void bind_search(py::module_& internals);
void bind_row_kernels(py::module_& internals);
void bind_passes(py::module_& internals);
void bind_products(py::module_& internals);
void bind_certified(py::module_& internals);
void bind_hopper_layout(py::module_& internals);
void bind_emulator(py::module_& internals);
