// The vector kernels of rows, for isa.h, which takes one file.
#include "vector_pairs.h"
#include "vector_project.h"
