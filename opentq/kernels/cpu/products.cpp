// scores and values for one kind of codes: -DOPENTQ_BITS=2, 3, 4 or 8, or 1 to 6 with -DOPENTQ_LOOKUP=1.
#include "products.h"

namespace otq {
template void scores<OPENTQ_BITS, OPENTQ_LOOKUP>(const uint8_t*, const uint16_t*, const Packed&, const Rows&, int, int, float*);
template void values<OPENTQ_BITS, OPENTQ_LOOKUP>(const uint8_t*, const Packed&, const Rows&, int, int);
}  // namespace otq
