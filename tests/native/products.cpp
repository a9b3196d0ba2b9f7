// Products per instruction set, the panels they take their right operand from, and the pairs of the bf16 unit.
#define GSSF_KERNELS "vector_product.h"
#include "isa.h"

#include "instruction_sets.h"

using namespace gssf;

namespace {

#define KERNELS(set)         \
  struct set##_kernels {     \
    FORWARD(set, pack_of)    \
    FORWARD(set, product_of) \
    FORWARD(set, pairs_of)   \
  };
FOR_EACH_SET(KERNELS)

// Strides in numbers, not bytes.
int64_t stride(const py::array& x, int dim) { return x.strides(dim) / x.itemsize(); }

// y [k, up to kPanel] of any strides as one panel [k, kPanel], flat.
template <class T, class A, class Kernels>
py::object pack(const py::array& y) {
  const int64_t k = y.shape(0), width = y.shape(1);
  expect(width <= kPanel<A>, "y: more columns than a panel has");
  std::vector<A> panel(k * kPanel<A>, std::numeric_limits<A>::quiet_NaN());
  Kernels::pack_of(Packing<T, A>{static_cast<const T*>(y.data()), panel.data(), k, width, stride(y, 0), stride(y, 1)});
  return array(panel);
}

// c [n, m], rows apart by any stride, = a [n, k], of any strides, times panels [ceil(m / kPanel), k, kPanel], or += it.
template <class A, class Kernels>
py::object product(const py::array& a, const py::array& panels, py::array& c, bool add) {
  const int64_t n = a.shape(0), k = a.shape(1), m = c.shape(1);
  expect(is_of<A>(c) && c.writeable() && c.ndim() == 2 && c.shape(0) == n && stride(c, 1) == 1,
         "c: expected [n, m] of a's dtype, writeable, columns adjacent");
  Kernels::product_of(Product<A>{
      static_cast<const A*>(a.data()), read<A>("panels", panels, ceil_div(m, kPanel<A>) * k * kPanel<A>),
      static_cast<A*>(c.mutable_data()), n, k, m, stride(a, 0), stride(a, 1), k * kPanel<A>, stride(c, 0), add});
  return py::none();
}

// x [lines, channels] of any strides rounded to bf16 in pairs of channels: rows [lines, padded / 2] of pairs, or a
// panel [padded / 2, kPairPanel] of them. Flat, with what the kernel may write behind it, all `fill` before.
template <class T, class Kernels>
py::object pairs(const py::array& x, bool panel, uint32_t fill) {
  const int64_t lines = x.shape(0), channels = x.shape(1);
  const int64_t length = ceil_div(channels, kPairStep) * kPairStep / 2;  // of a line, in pairs
  expect(lines <= kPairPanel, "x: more lines than a panel has columns");
  std::vector<uint32_t> out(kPairPanel * length, fill);
  Kernels::pairs_of(Pairing<T>{static_cast<const T*>(x.data()), out.data(), lines, channels, stride(x, 0), stride(x, 1),
                               panel ? kPairPanel : lines, panel ? 1 : length, panel ? kPairPanel : 1});
  return array(out);
}

template <class Kernels>
void bind(py::module_ set) {
  set.def("pack", [](const py::array& y) -> py::object {
    return with_dtype<float, double, c10::Half, c10::BFloat16>("y", y, [&](auto type) {
      using T = decltype(type);
      return pack<T, Accumulate<T>, Kernels>(y);
    });
  });
  set.def("product", [](const py::array& a, const py::array& panels, py::array c, bool add) {
    return with_dtype<float, double>("a", a,
                                     [&](auto type) { return product<decltype(type), Kernels>(a, panels, c, add); });
  });
  set.def("pairs", [](const py::array& x, bool panel, uint32_t fill) {
    return with_dtype<float, c10::Half, c10::BFloat16>(
        "x", x, [&](auto type) { return pairs<decltype(type), Kernels>(x, panel, fill); });
  });
}

}  // namespace

void bind_products(py::module_& internals) {
  internals.attr("kPanel") = py::dict(py::arg("float32") = kPanel<float>, py::arg("float64") = kPanel<double>);
  internals.attr("kChain") = kChain;
  internals.attr("kDepth") = kDepth;
  internals.attr("kPairPanel") = kPairPanel;
  internals.attr("kPairStep") = kPairStep;
  BIND_EACH_SET(bind, internals);
}
