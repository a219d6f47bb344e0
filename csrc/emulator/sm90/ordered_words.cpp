#include "ordered_words.h"

namespace heedful::emulator {
namespace {

std::string word_name(uint32_t address) { return "shared word " + std::to_string(address / 4 * 4); }

}  // namespace

void OrderedWords::check(const Word& word, uint32_t address, Kind access, const Stamp& by, const char* instruction,
                         const Clock& known) const {
  const auto fail = [&](const std::string& against) {
    throw Fault("race: " + word_name(address) + (access == Kind::read ? " is read by " : " is written by ") +
                (instruction ? instruction : clocks_.name(by.agent)) + ", " + text(by.where) + ", " + against);
  };
  const auto before = [&](const Stamp& event, const char* done) {
    const bool thread = clocks_.name(event.agent).starts_with("thread");
    return (thread ? "without a barrier after the " : "while in flight, or not waited for: the ") + std::string(done) +
           " of " + clocks_.name(event.agent) + ", " + text(event.where);
  };
  if (word.mbarrier) fail("but belongs to an mbarrier");
  if (word.in_flight)
    fail(std::string("while a ") + word.in_flight + ", " + text(word.writer.where) + ", is in flight to it");
  if (!known.knows(word.writer)) fail(before(word.writer, "write"));
  if (access == Kind::read) return;
  for (const Stamp& reader : word.readers)
    for (int part = 0; part <= (access == Kind::store ? clocks_.parts(reader.agent) : 0); ++part)
      if (!known.knows({reader.agent + part, reader.time, reader.where})) fail(before(reader, "read"));
}

void OrderedWords::check_proxy(const Word& word, uint32_t address, const AsyncAccess& by) const {
  if (word.generic && !clocks_.fenced(Clocks::async_proxy, word.writer, by.known))
    throw Fault("no proxy fence: " + word_name(address) + " is touched by " + by.instruction + ", " +
                text(by.stamp.where) + ", but " + clocks_.name(word.writer.agent) + ", which wrote it, " +
                text(word.writer.where) + ", has not fenced that before their barrier");
}

void OrderedWords::add_reader(Word& word, const Stamp& reader) {
  for (Stamp& other : word.readers)
    if (other.agent == reader.agent) {
      other = reader;
      return;
    }
  word.readers.push_back(reader);
}

void OrderedWords::read(uint32_t address, uint32_t bytes, const Access& by) {
  const int first = by.whole_warp ? by.thread / 32 * 32 : by.thread, count = by.whole_warp ? 32 : 1;
  for (uint32_t a = address / 4; a < (address + bytes + 3) / 4; ++a)
    for (int thread = first; thread < first + count; ++thread) {
      check(words_[a], a * 4, Kind::read, clocks_.now(thread, by.where), nullptr, clocks_.of(thread));
      add_reader(words_[a], clocks_.now(thread, by.where));
    }
}

void OrderedWords::write(uint32_t address, uint32_t bytes, const Access& by) {
  for (uint32_t a = address / 4; a < (address + bytes + 3) / 4; ++a) {
    Word& word = words_[a];
    // Two threads may write the two halves of a word.
    const bool half = bytes < 4 && word.generic && word.writer.agent / 32 == by.thread / 32 && word.readers.empty();
    if (!half) check(word, a * 4, Kind::store, clocks_.now(by.thread, by.where), nullptr, clocks_.of(by.thread));
    word.writer = clocks_.now(by.thread, by.where), word.generic = true;
    word.readers.clear();
  }
}

void OrderedWords::begin_copy(uint32_t address, uint32_t bytes, const Access& by) {
  write(address, bytes, by);
  for (uint32_t a = address / 4; a < (address + bytes) / 4; ++a) words_[a].in_flight = "copy_async";
}

void OrderedWords::end_copy(uint32_t address, uint32_t bytes, const Access& by) {
  end_write(address, bytes, clocks_.now(by.thread, by.where));
}

void OrderedWords::async_read(uint32_t address, uint32_t bytes, const AsyncAccess& by) {
  for (uint32_t a = address / 4; a < (address + bytes + 3) / 4; ++a) {
    check(words_[a], a * 4, Kind::read, by.stamp, by.instruction, by.known);
    check_proxy(words_[a], a * 4, by);
    add_reader(words_[a], by.stamp);
  }
}

void OrderedWords::begin_write(uint32_t address, uint32_t bytes, const AsyncAccess& by) {
  for (uint32_t a = address / 4; a < (address + bytes + 3) / 4; ++a) {
    check(words_[a], a * 4, Kind::async_write, by.stamp, by.instruction, by.known);
    check_proxy(words_[a], a * 4, by);
    words_[a].in_flight = by.instruction, words_[a].writer = by.stamp, words_[a].generic = false;
    words_[a].readers.clear();
  }
}

void OrderedWords::end_write(uint32_t address, uint32_t bytes, const Stamp& by) {
  for (uint32_t a = address / 4; a < (address + bytes + 3) / 4; ++a)
    words_[a].in_flight = nullptr, words_[a].writer = by;
}

void OrderedWords::take(uint32_t address, uint32_t bytes, const Access& by) {
  write(address, bytes, by);
  for (uint32_t a = address / 4; a < (address + bytes) / 4; ++a) words_[a].mbarrier = true;
}

}  // namespace heedful::emulator
