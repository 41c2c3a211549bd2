// scores<BITS> and values<BITS> for one width: -DOPENTQ_BITS=2, 3, 4 or 8.
#include "products.h"

namespace otq {
template void scores<OPENTQ_BITS>(const uint8_t*, const uint16_t*, const Packed&, const Rows&, int, int, float*);
template void values<OPENTQ_BITS>(const uint8_t*, const Packed&, const Rows&, int, int);
}  // namespace otq
