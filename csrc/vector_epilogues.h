// The vector kernels of the sweep's epilogues. See isa.h.
#include "vector_maxima.h"
#include "vector_relative.h"
