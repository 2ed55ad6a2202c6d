// Continues token ids with the most likely ones: a bundle of `cosmos-export torchscript`, run by libtorch alone.
//
//     cosmos_decode --max-new-tokens 32 my-bundle 5 7 9
//
// T  new tokens    N  tokens in all    L  cache length    K  kv heads    E  head_dim    V  vocabulary
//
// A TorchScript file is a program, which may do whatever this process may: run none that you do not trust. This example
// does not compare the file with the hash in the bundle's manifest; `cosmos-run inspect my-bundle --check` does.

#include <ATen/Parallel.h>
#include <torch/script.h>

#include <charconv>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <map>
#include <regex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using Path = std::filesystem::path;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostThreads = 1024;
constexpr auto kUsage =
    "usage: cosmos_decode [--max-new-tokens N] [--threads N] BUNDLE TOKEN_ID...\n"
    "  BUNDLE             a folder that `cosmos-export torchscript` made. Its model.pt is a program, and is run as it\n"
    "                     lies there: its hash is not checked (`cosmos-run inspect BUNDLE --check` does that)\n"
    "  TOKEN_ID...        the prompt\n"
    "  --max-new-tokens   how many tokens to add (default: 32)\n"
    "  --threads          of PyTorch (default: its own choice)\n";

const std::map<std::string, torch::ScalarType> kCacheTypes = {
    {"float32", torch::kFloat32}, {"bfloat16", torch::kBFloat16}, {"float16", torch::kFloat16}};

/// The command line is at fault: exit code 2.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The whole of `text` as a number from `least` to `most`.
int64_t integer(const std::string& name, const std::string& text, int64_t least, int64_t most) {
  int64_t value = 0;
  const auto end = text.data() + text.size();
  const auto [stopped, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stopped != end || value < least || value > most) {
    throw UsageError(name + ": expected a number from " + std::to_string(least) + " to " + std::to_string(most) +
                     ", got '" + text + "'");
  }
  return value;
}

struct Options {
  Path bundle;
  std::vector<std::string> prompt;  // ids, to be read once the size of the vocabulary is known
  int64_t max_new_tokens = 32;
  int64_t threads = 0;  // 0: PyTorch's own choice
};

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  std::vector<std::string> positional;
  for (auto it = arguments.begin(); it != arguments.end(); ++it) {
    if (it->rfind("--", 0) != 0) {
      positional.push_back(*it);
      continue;
    }
    const std::string& name = *it;
    const bool is_threads = name == "--threads";
    if (!is_threads && name != "--max-new-tokens") throw UsageError(name + ": no such option");
    if (++it == arguments.end()) throw UsageError(name + ": expected a number behind it");
    (is_threads ? options.threads : options.max_new_tokens) = integer(name, *it, 1, is_threads ? kMostThreads : kMost);
  }
  if (positional.size() < 2) throw UsageError("expected a bundle and at least one token id");
  options.bundle = positional.front();
  options.prompt.assign(positional.begin() + 1, positional.end());
  return options;
}

/// What the manifest says about the model.
struct Geometry {
  int64_t n_layers, n_kv_heads, head_dim, vocab_size, max_sequence_length;
  torch::ScalarType cache_dtype;
};

/// The value of a key that a manifest has once. In JSON a quote inside a string has a backslash before it, so `"key":`
/// is never found in one, whatever it says.
std::string value_of(const std::string& manifest, const std::string& key) {
  std::smatch found;
  if (!std::regex_search(manifest, found, std::regex('"' + key + "\"\\s*:\\s*\"?(\\w+)"))) {
    throw std::runtime_error("manifest.json: expected \"" + key + "\" in it; export the bundle again");
  }
  return found[1];
}

Geometry read_geometry(const Path& bundle) {
  std::ifstream file(bundle / "manifest.json");
  if (!file) {
    throw std::runtime_error(bundle.string() + ": expected a bundle of `cosmos-export torchscript`, cannot read " +
                             (bundle / "manifest.json").string());
  }
  const std::string manifest{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const auto number = [&](const char* key) {
    try {
      return integer(key, value_of(manifest, key), 1, kMost);
    } catch (const UsageError& error) {
      throw std::runtime_error(std::string("manifest.json: ") + error.what());
    }
  };
  const std::string activations = value_of(manifest, "activations");
  const auto type = kCacheTypes.find(activations);
  if (type == kCacheTypes.end()) {
    throw std::runtime_error("manifest.json: activations: expected float32, bfloat16 or float16, got " + activations);
  }
  return {number("n_layers"),   number("n_kv_heads"),          number("head_dim"),
          number("vocab_size"), number("max_sequence_length"), type->second};
}

/// The program of a bundle: logits = program(input_ids, attention_mask, logit_offsets, past_key_values).
torch::jit::Module load_program(const Path& bundle) {
  const Path file = bundle / "model.pt";
  if (!std::filesystem::exists(file)) {
    throw std::runtime_error(file.string() + ": no such file; `cosmos-export torchscript` makes bundles that have one");
  }
  auto program = torch::jit::load(file.string(), torch::kCPU);
  program.eval();
  const auto arguments = program.get_method("forward").function().getSchema().arguments().size() - 1;  // less `self`
  if (arguments != 4) {
    throw std::runtime_error(file.string() + ": expected a plain decoder with a cache, which takes 4 arguments, got " +
                             "one that takes " + std::to_string(arguments) +
                             "; export without --capabilities, to a recipe with a key/value cache");
  }
  return program;
}

/// One sequence: the program, and a cache for so many tokens, which the program writes to where it lies.
class Decoder {
 public:
  Decoder(torch::jit::Module program, const Geometry& model, int64_t capacity)
      : program_(std::move(program)),
        mask_(torch::ones({1, capacity}, torch::kInt64)),
        last_position_(torch::zeros({1}, torch::kInt64)),
        token_(torch::zeros({1, 1}, torch::kInt64)) {
    for (int64_t part = 0; part < 2 * model.n_layers; ++part) {  // key and value of every layer
      cache_.push_back(torch::zeros({1, model.n_kv_heads, capacity, model.head_dim}, model.cache_dtype));
    }
  }

  /// Appends tokens, usually a prompt; the most likely one behind them.
  int64_t prefill(const std::vector<int64_t>& ids) { return append(torch::tensor(ids, torch::kInt64).unsqueeze(0)); }

  /// Appends one token; the most likely one behind it.
  int64_t decode_one_token(int64_t id) {
    token_.fill_(id);
    return append(token_);
  }

 private:
  int64_t append(const torch::Tensor& ids) {  // (1, T)
    length_ += ids.size(1);
    const auto seen = mask_.narrow(1, 0, length_);  // (1, N): of every token that there is, the new ones included
    const auto logits = program_.forward({ids, seen, last_position_, cache_}).toTensor();  // (1, 1, V)
    return logits.argmax().item<int64_t>();
  }

  torch::jit::Module program_;
  torch::Tensor mask_, last_position_, token_;
  c10::List<torch::Tensor> cache_;  // each (1, K, L, E)
  int64_t length_ = 0;
};

void decode(const Options& options) {
  const Geometry model = read_geometry(options.bundle);
  std::vector<int64_t> prompt;
  for (const auto& id : options.prompt) prompt.push_back(integer("token id", id, 0, model.vocab_size - 1));
  const int64_t tokens = static_cast<int64_t>(prompt.size()) + options.max_new_tokens;
  if (tokens > model.max_sequence_length) {
    throw UsageError("expected at most " + std::to_string(model.max_sequence_length) + " tokens, got " +
                     std::to_string(prompt.size()) + " of the prompt and " + std::to_string(options.max_new_tokens) +
                     " new ones; lower --max-new-tokens or shorten the prompt");
  }
  if (options.threads > 0) at::set_num_threads(static_cast<int>(options.threads));

  const torch::InferenceMode no_gradients;
  Decoder decoder(load_program(options.bundle), model, tokens);
  int64_t token = decoder.prefill(prompt);
  std::cout << token << std::flush;
  for (int64_t made = 1; made < options.max_new_tokens; ++made) {
    token = decoder.decode_one_token(token);
    std::cout << ' ' << token << std::flush;
  }
  std::cout << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  try {
    decode(parse({argv + 1, argv + argc}));
    return 0;
  } catch (const UsageError& error) {
    std::cerr << "cosmos_decode: " << error.what() << '\n' << kUsage;
    return 2;
  } catch (const c10::Error& error) {  // its what() has the stack in it, too
    std::cerr << "cosmos_decode: " << error.what_without_backtrace() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "cosmos_decode: " << error.what() << '\n';
  }
  return 1;
}
