#pragma once

#if !__has_include(<unistd.h>)
#error "lithe: io/ reads and saves files through POSIX calls (pread, fsync), which this system does not have."
#endif
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>
#include <vector>

#include "lithe/core/error.hpp"

namespace lithe::inline LITHE_ABI {

/// A regular file open for reading at any position; reading is const and safe from several threads. Throws io_error.
class input_file {
 public:
  /// Opens a file; throws io_error unless it is a regular one that can be read.
  explicit input_file(std::filesystem::path path) : path_(std::move(path)) {
    // a FIFO in place of the file must not block before fstat can refuse it
    descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor_ < 0) throw io_error(concat(path_.string(), ": cannot be opened: ", std::strerror(errno)));
    struct stat status {};
    const bool regular = ::fstat(descriptor_, &status) == 0 && S_ISREG(status.st_mode);
    if (!regular) {
      ::close(descriptor_);
      throw io_error(concat(path_.string(), ": is not a regular file"));
    }
    size_ = static_cast<std::uint64_t>(status.st_size);
  }
  /// Takes over the open file; `other` can only be destroyed then.
  input_file(input_file&& other) noexcept : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)), size_(other.size_) {}
  input_file& operator=(input_file&&) = delete;
  ~input_file() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  /// The path that it was opened at.
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  /// Its bytes when it was opened.
  [[nodiscard]] std::uint64_t size() const { return size_; }

  /// Fills [out, out + bytes) from `offset` on.
  void read_at(std::uint64_t offset, void* out, std::size_t bytes) const {
    auto* to = static_cast<char*>(out);
    while (bytes > 0) {
      const ssize_t n = ::pread(descriptor_, to, bytes, static_cast<off_t>(offset));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) throw io_error(concat(path_.string(), ": cannot be read: ", std::strerror(errno)));
      require<io_error>(n > 0, path_.string(), ": expected ", bytes, " more bytes at offset ", offset, ", found the end of the file");
      to += n;
      offset += static_cast<std::uint64_t>(n);
      bytes -= static_cast<std::size_t>(n);
    }
  }

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
};

/// A file that appears whole or not at all: it is written beside `path` under a temporary name, and `commit` flushes it
/// to the disk and renames it over the old one. Destroyed before that, it removes the temporary and the old file is as
/// it was. A link stays, and what it names is replaced; the new file has the mode of the old one, and its owner where
/// the system allows it. Throws io_error.
class atomic_file {
 public:
  /// Creates the temporary beside `path`, or beside what a link there names. Throws io_error if it cannot, or would
  /// replace no regular file, or one that this process may not write.
  explicit atomic_file(const std::filesystem::path& path) : path_(behind_links(path)) {
    buffer_.reserve(buffer_bytes);
    require<io_error>(path_.has_filename(), "cannot be written: expected the name of a file, got '", path.string(),
                      "'");
    struct stat old {};
    const bool exists = ::stat(path_.c_str(), &old) == 0;
    require<io_error>(!exists || S_ISREG(old.st_mode), path_.string(), ": cannot be replaced: is not a regular file");
    if (exists && ::faccessat(AT_FDCWD, path_.c_str(), W_OK, AT_EACCESS) != 0) fail("cannot be replaced");
    for (int attempt = 0; descriptor_ < 0; ++attempt) {
      temporary_ = concat(path_.string(), ".partial-", ::getpid(), "-", attempt);
      descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (descriptor_ < 0 && errno != EEXIST) fail("cannot be created");
    }
    if (!exists) return;
    // only the superuser may give files away
    [[maybe_unused]] const int owner = ::fchown(descriptor_, old.st_uid, old.st_gid);
    ::fchmod(descriptor_, old.st_mode & 07777);
  }
  atomic_file(const atomic_file&) = delete;
  atomic_file& operator=(const atomic_file&) = delete;
  ~atomic_file() {
    if (descriptor_ < 0) return;
    ::close(descriptor_);
    ::unlink(temporary_.c_str());
  }

  /// Appends to the temporary; throws io_error if the disk refuses it.
  void write(const void* data, std::size_t bytes) {
    const auto* from = static_cast<const char*>(data);
    if (buffer_.size() + bytes > buffer_bytes) flush();
    if (bytes >= buffer_bytes)
      put(from, bytes);
    else
      buffer_.insert(buffer_.end(), from, from + bytes);
    size_ += bytes;
  }
  /// The bytes written so far.
  [[nodiscard]] std::uint64_t size() const { return size_; }

  /// Puts the file in its place, with all that was written; nothing can be written after it. Throws io_error.
  void commit() {
    flush();
    // EINVAL: this file system has nothing to flush to.
    if (::fsync(descriptor_) != 0 && errno != EINVAL) fail("cannot be flushed to the disk");
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("cannot be put in place");
    ::close(std::exchange(descriptor_, -1));
    // The name, too, is to survive a power cut. File systems that cannot do this have the file already.
    const std::filesystem::path folder = path_.has_parent_path() ? path_.parent_path() : ".";
    if (const int directory = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); directory >= 0) {
      ::fsync(directory);
      ::close(directory);
    }
  }

 private:
  static constexpr std::size_t buffer_bytes = std::size_t{1} << 20;

  static std::filesystem::path behind_links(std::filesystem::path path) {
    std::error_code error;
    for (int links = 0; std::filesystem::is_symlink(path, error); ++links) {
      require<io_error>(links < 40, path.string(), ": cannot be replaced: is a link to itself");
      path = path.parent_path() / std::filesystem::read_symlink(path, error);
    }
    return path;
  }
  void flush() {
    put(buffer_.data(), buffer_.size());
    buffer_.clear();
  }
  void put(const char* from, std::size_t bytes) {
    while (bytes > 0) {
      const ssize_t n = ::write(descriptor_, from, bytes);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail("cannot be written");
      from += n;
      bytes -= static_cast<std::size_t>(n);
    }
  }
  [[noreturn]] void fail(const char* what) const {
    const int error = errno;
    throw io_error(concat(path_.string(), ": ", what, ": ", std::strerror(error)));
  }

  std::filesystem::path path_;
  std::string temporary_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
  std::vector<char> buffer_;
};

/// Throws io_error unless `path` can be written: for programs that write it only after hours of work.
inline void require_writable(const std::filesystem::path& path) { const atomic_file attempt(path); }

}  // namespace lithe::inline LITHE_ABI
