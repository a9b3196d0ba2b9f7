// The vector kernels of the sweep and its epilogues. See isa.h.
#include "vector_certified.h"
#include "vector_maxima.h"
#include "vector_product.h"
#include "vector_relative.h"
#include "vector_search.h"
