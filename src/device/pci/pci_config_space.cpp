#include "base/check.h"
#include "device/pci/pci_device.h"

namespace kvartz {

uint32_t PciConfigSpace::Read(unsigned offset, unsigned size) const {
  VERIFY(size <= 4 && offset + size <= kSize);
  uint32_t value = 0;
  for (unsigned i = 0; i < size; i++) value |= uint32_t{bytes_[offset + i]} << (8 * i);
  return value;
}

void PciConfigSpace::Write(unsigned offset, unsigned size, uint32_t value) {
  VERIFY(size <= 4 && offset + size <= kSize);
  for (unsigned i = 0; i < size; i++) {
    uint8_t byte = value >> (8 * i);
    uint8_t& now = bytes_[offset + i];
    now = (now & ~writable_[offset + i]) | (byte & writable_[offset + i]);
    now &= ~(byte & w1c_[offset + i]);
  }
}

void PciConfigSpace::Set(unsigned offset, unsigned size, uint32_t value) {
  VERIFY(size <= 4 && offset + size <= kSize);
  for (unsigned i = 0; i < size; i++) bytes_[offset + i] = value >> (8 * i);
}

void PciConfigSpace::SetWritable(unsigned offset, unsigned size, uint32_t mask) {
  VERIFY(size <= 4 && offset + size <= kSize);
  for (unsigned i = 0; i < size; i++) writable_[offset + i] = mask >> (8 * i);
}

void PciConfigSpace::SetWriteOneToClear(unsigned offset, unsigned size, uint32_t mask) {
  VERIFY(size <= 4 && offset + size <= kSize);
  for (unsigned i = 0; i < size; i++) w1c_[offset + i] = mask >> (8 * i);
}

void PciConfigSpace::ResetGuestBits() {
  for (unsigned i = 0; i < kSize; i++) bytes_[i] &= ~(writable_[i] | w1c_[i]);
}

void PciConfigSpace::LoadGuestBits(const std::array<uint8_t, kSize>& saved) {
  for (unsigned i = 0; i < kSize; i++) {
    uint8_t guest = writable_[i] | w1c_[i];
    bytes_[i] = (bytes_[i] & ~guest) | (saved[i] & guest);
  }
}

}  // namespace kvartz
