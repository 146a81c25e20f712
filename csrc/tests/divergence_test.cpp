// The divergences of one instruction set against the formulas in double, on threads.
//
// usage: divergence_test [default|avx2|...|amx_bf16]; exit code 77 where it cannot run.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "kernels.h"

using namespace fused_losses;
using K = DivergenceKind;

namespace {

constexpr double kLimit = 1.5;

struct Shape {
  int64_t n, c, d, dt;  // dt = 0: a dense teacher
  bool normalize, bias, subset, labels;
  Precision precision;
  double apart = 1;  // the teacher is the student and `apart` of something else, where dt = d
  bool same_weights = false;
};

struct Sides {
  std::vector<double> raw, z;  // [n, k] without and with bias
};

double kl(double p, double q) { return p > 0 ? p * (std::log(p) - std::log(q)) : 0; }
double sigmoid(double x) {
  return x > 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x));
}

// log(1 + exp(x)).
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

double coin(double u, double v) { return softplus(u) - softplus(v) - sigmoid(v) * (u - v); }

// The differentiable folds of one row, from the scores of its other classes.
std::vector<double> folds(K kind, double param, const std::vector<double>& u,
                          const std::vector<double>& v) {
  const auto softmax = [](const std::vector<double>& z, double eps) {
    double top = -INFINITY, total = 0;
    for (const double s : z) top = std::max(top, eps * s);
    std::vector<double> q;
    for (const double s : z) total += std::exp(eps * s - top);
    for (const double s : z) q.push_back(std::exp(eps * s - top) / total);
    return std::pair(q, top + std::log(total));
  };
  const auto q_s = softmax(u, 1).first, q_t = softmax(v, 1).first;
  if (kind == K::kPower) {
    const auto [share, lse] = softmax(v, param);
    double mean = 0;
    for (size_t j = 0; j < u.size(); ++j) mean += share[j] * u[j];
    return {lse, mean};
  }
  double out = 0;
  const auto cut = [&](double x) { return std::clamp(x, -param, param); };
  for (size_t j = 0; j < u.size(); ++j) {
    const double s = q_s[j], t = q_t[j], m = param * t + (1 - param) * s;
    if (kind == K::kForward) out += kl(t, s);
    if (kind == K::kReverse) out += kl(s, t);
    if (kind == K::kJensenShannon) out += param * kl(t, m) + (1 - param) * kl(s, m);
    if (kind == K::kTotalVariation) out += std::abs(s - t) / 2;
    if (kind == K::kSquared) out += (u[j] - v[j]) * (u[j] - v[j]);
    if (kind == K::kBernoulli) out += coin(cut(u[j]), cut(v[j]));
    if (kind == K::kBernoulliNorm) out += coin(cut(u[j] - v[j]), 0);
  }
  return {out};
}

// d (sum of g folds) / dz, by central differences of the literal formula.
double slope(K kind, double param, const std::vector<double>& g, std::vector<double> u,
             std::vector<double> v, size_t j, bool teacher) {
  const double h = 1e-5;
  double out = 0;
  for (const double sign : {1.0, -1.0}) {
    (teacher ? v : u)[j] += sign * h;
    const auto f = folds(kind, param, u, v);
    (teacher ? v : u)[j] -= sign * h;
    for (size_t k = 0; k < f.size(); ++k) out += sign * g[k] * f[k] / (2 * h);
  }
  return out;
}

Sides scores(const std::vector<float>& x, const std::vector<float>& w, const std::vector<float>& b,
             const std::vector<int64_t>& ids, int64_t n, int64_t d, bool normalize, bool dense,
             const std::vector<float>& scale, int64_t c) {
  const size_t k = ids.size();
  Sides out;
  for (int64_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < k; ++j) {
      double product = 0, square = 0;
      for (int64_t e = 0; e < d; ++e) {
        product += double(x[i * d + e]) * w[ids[j] * d + e];
        square += double(w[ids[j] * d + e]) * w[ids[j] * d + e];
      }
      if (normalize) product /= std::sqrt(square);
      if (dense) product = double(x[i * c + ids[j]]) * scale[i];
      out.raw.push_back(product);
      out.z.push_back(product + (b.empty() ? 0 : b[ids[j]]));
    }
  }
  return out;
}

void check(const Kernels& kernels, K kind, double param, const Shape& s) {
  const int64_t n = s.n, c = s.c, d = s.d, dt = s.dt;
  const bool dense = dt == 0;
  const auto x = random(n * d, s.normalize ? 2 : 2 / std::sqrt(float(d)), 1),
             w = random(c * d, 1, 2);
  auto t =
      random(dense ? n * c : n * dt, dense ? 2 : 2 / std::sqrt(float(std::max<int64_t>(dt, 1))), 3);
  auto wt = random(c * dt, 1, 4);
  if (dt == d) {
    for (size_t e = 0; e < t.size(); ++e) t[e] = x[e] + float(s.apart) * (t[e] - x[e]);
    const float of_weights = s.same_weights ? 0 : float(s.apart);
    for (size_t e = 0; e < wt.size(); ++e) wt[e] = w[e] + of_weights * (wt[e] - w[e]);
  }
  std::vector<float> b, bt, scale(n, 1);
  if (s.bias) b = random(c, 1, 5);
  if (s.bias) bt = dt == d && s.apart < 1 ? b : random(c, 1, 6);
  if (dense) scale = random(n, 1, 7);
  std::vector<int64_t> ids;
  for (int64_t j = 0; j < c; ++j) {
    if (!s.subset || j % 3 != 1) ids.push_back(j);
  }
  const auto k = static_cast<int64_t>(ids.size());
  std::vector<int64_t> target(n, -1);
  std::vector<Target> targets;
  for (int64_t i = 0; i < n; ++i) {
    if (!s.labels || i % 5 == 3) continue;
    target[i] = (i * 7) % k;
    targets.push_back({target[i], i});
  }
  std::sort(targets.begin(), targets.end(), [](const Target& a, const Target& e) {
    return a.position != e.position ? a.position < e.position : a.row < e.row;
  });
  const Sides u = scores(x, w, b, ids, n, d, s.normalize, false, scale, c);
  const Sides v = scores(t, wt, bt, ids, n, dt, s.normalize && !dense, dense, scale, c);

  Problem side = {};
  side.n = n;
  side.k = k;
  side.ids = s.subset ? ids.data() : nullptr;
  side.targets = targets.data();
  side.target_count = static_cast<int64_t>(targets.size());
  side.precision = s.precision;
  DivergenceProblem p = {side, side, {}, kind, param};
  p.student.x = {x.data(), Type::kFloat32, d};
  p.student.w = {w.data(), Type::kFloat32, d};
  p.student.d = d;
  p.student.bias = s.bias ? b.data() : nullptr;
  p.student.normalize = s.normalize;
  p.teacher.x = {t.data(), Type::kFloat32, dt};
  p.teacher.w = {wt.data(), Type::kFloat32, dt};
  p.teacher.d = dt;
  p.teacher.bias = s.bias ? bt.data() : nullptr;
  p.teacher.normalize = s.normalize && !dense;
  if (dense) p.dense = {t.data(), Type::kFloat32, c, 1, scale.data()};
  const int64_t kept_scores = s.labels ? k * round_up(n, kKeptPadding) : 0;
  std::vector<float> kept(2 * kept_scores, NAN);
  if (s.labels) {
    p.student.kept = kept.data();
    p.student.kept_classes = k;
    if (!dense) p.teacher.kept = kept.data() + kept_scores;
    if (!dense) p.teacher.kept_classes = k;
  }

  const int count = folds_of(kind), differentiable = kind == K::kPower ? 2 : 1;
  const Parallel parallel = {3, on_threads};
  std::vector<double> lse(n), teacher_lse(n), got_target(n, NAN), teacher_target(n, NAN),
      got((count + kept_of(kind)) * n);
  std::vector<float> dx(n * d), dw(c * d), db(c), dteacher(dense ? n * c : n * dt), dwt(c * dt),
      dbt(c), dscale(n);
  DivergenceBackwardOut grads = {};
  grads.student = {dx.data(), dw.data(), s.bias ? db.data() : nullptr, false};
  grads.teacher = {dense ? nullptr : dteacher.data(), dense ? nullptr : dwt.data(),
                   s.bias ? dbt.data() : nullptr, false};
  if (dense) {
    grads.ddense = dteacher.data();
    grads.dense_columns = c;
    grads.dscale = dscale.data();
  }
  const auto& kernel = kernels.divergence;
  const size_t bytes = std::max(kernel.forward_bytes(p, 3), kernel.backward_bytes(p, grads, 3));
  // no zeros that a kernel did not write
  const auto fresh = [bytes] {
    return std::memset(std::aligned_alloc(64, round_up(bytes, 64)), 0x7f, bytes);
  };
  void* buffer = fresh();
  kernel.forward(
      p, {lse.data(), teacher_lse.data(), got_target.data(), teacher_target.data(), got.data()},
      buffer, parallel);
  const auto g_lse = random(n, 0.1f, 11), g_teacher_lse = random(n, 0.1f, 12);
  const auto g_target = random(n, 1, 13), g_teacher_target = random(n, 1, 14);
  const auto g_folds = random(count * n, 1, 15);
  const bool near = s.apart < 0.1;
  // folds of shards are joined by others, who keep nothing beside them
  const bool kept_folds = n != 19;
  const std::vector<float> none(n, 0);
  const DivergenceBackwardIn in = {near ? none.data() : g_lse.data(),
                                   near ? none.data() : g_teacher_lse.data(),
                                   g_target.data(),
                                   g_teacher_target.data(),
                                   g_folds.data(),
                                   lse.data(),
                                   teacher_lse.data(),
                                   got.data(),
                                   kept_folds ? got.data() + count * n : nullptr};
  std::free(buffer);
  buffer = fresh();
  kernel.backward(p, in, grads, buffer, parallel);
  std::free(buffer);

  std::vector<double> want_lse(n), want_teacher_lse(n), want_target(n), want_teacher_target(n),
      want(differentiable * n), want_dx(n * d), want_dw(c * d), want_db(c),
      want_dteacher(dteacher.size()), want_dwt(c * dt), want_dbt(c), want_dscale(n);
  std::vector<double> g_u(n * k), g_v(n * k);
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> a, e;
    for (int64_t j = 0; j < k; ++j) {
      if (j == target[i]) {
        want_target[i] = u.z[i * k + j];
        want_teacher_target[i] = v.z[i * k + j];
        continue;
      }
      a.push_back(u.z[i * k + j]);
      e.push_back(v.z[i * k + j]);
      want_lse[i] += std::exp(u.z[i * k + j]);
      want_teacher_lse[i] += std::exp(v.z[i * k + j]);
    }
    want_lse[i] = std::log(want_lse[i]);
    want_teacher_lse[i] = std::log(want_teacher_lse[i]);
    const auto f = folds(kind, param, a, e);
    std::vector<double> g;
    for (int q = 0; q < differentiable; ++q) {
      want[q * n + i] = f[q];
      g.push_back(g_folds[q * n + i]);
    }
    for (int64_t j = 0, at = 0; j < k; ++j) {
      double &of_u = g_u[i * k + j], &of_v = g_v[i * k + j];
      if (j == target[i]) {
        of_u = g_target[i];
        of_v = g_teacher_target[i];
        continue;
      }
      of_u = slope(kind, param, g, a, e, at, false);
      of_v = slope(kind, param, g, a, e, at++, true);
      if (near) continue;
      of_u += g_lse[i] * std::exp(u.z[i * k + j] - want_lse[i]);
      of_v += g_teacher_lse[i] * std::exp(v.z[i * k + j] - want_teacher_lse[i]);
    }
  }
  const auto gradients = [&](const std::vector<double>& g, const Sides& of,
                             const std::vector<float>& rows, const std::vector<float>& weight,
                             int64_t width, std::vector<double>& drows,
                             std::vector<double>& dweight, std::vector<double>& dbias) {
    for (int64_t j = 0; j < k; ++j) {
      const int64_t id = ids[j];
      double square = 0, along = 0;
      for (int64_t e = 0; e < width; ++e) {
        square += double(weight[id * width + e]) * weight[id * width + e];
      }
      const double norm = s.normalize ? std::sqrt(square) : 1;
      for (int64_t i = 0; i < n; ++i) {
        const double at = g[i * k + j];
        dbias[id] += at;
        along += at * of.raw[i * k + j];
        for (int64_t e = 0; e < width; ++e) {
          drows[i * width + e] += at * weight[id * width + e] / norm;
          dweight[id * width + e] += at * rows[i * width + e] / norm;
        }
      }
      for (int64_t e = 0; s.normalize && e < width; ++e) {
        dweight[id * width + e] -= along * weight[id * width + e] / square;
      }
    }
  };
  gradients(g_u, u, x, w, d, want_dx, want_dw, want_db);
  if (!dense) gradients(g_v, v, t, wt, dt, want_dteacher, want_dwt, want_dbt);
  for (int64_t i = 0; dense && i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      want_dteacher[i * c + ids[j]] = g_v[i * k + j] * scale[i];
      want_dscale[i] += g_v[i * k + j] * t[i * c + ids[j]];
      want_dbt[ids[j]] += g_v[i * k + j];
    }
  }
  const bool rounded = s.precision == Precision::kBFloat16;
  const double bound = rounded ? 5e-2 : (near ? 1e-5 : 5e-6);
  const double steep = s.precision == Precision::kFull ? (1e-5) : 5e-2;
  char name[200];
  std::snprintf(name, sizeof name,
                "%s kind=%d n=%ld c=%ld d=%ld dt=%ld%s%s%s%s precision=%d apart=%g",
                kernels.capability, int(kind), long(n), long(c), long(d), long(dt),
                s.normalize ? " normalize" : "", s.bias ? " bias" : "", s.subset ? " subset" : "",
                s.labels ? " labels" : "", int(s.precision), s.apart);
  const std::string at = name;
  got.resize(differentiable * n);
  const auto close = [&](const auto& have, const auto& should, double most, const char* what) {
    const double error = worst(have, should);
    expect(error < most, at + ": " + what + " " + std::to_string(error * 1e6) + "e-6");
  };
  close(lse, want_lse, rounded ? 2e-2 : 2e-6, "lse");
  close(teacher_lse, want_teacher_lse, rounded ? 2e-2 : 2e-6, "teacher_lse");
  close(got_target, want_target, 2e-6, "target");
  close(teacher_target, want_teacher_target, 2e-6, "teacher_target");
  close(got, want, bound, "folds");
  close(dx, want_dx, steep, "dx");
  close(dw, want_dw, steep, "dw");
  close(dteacher, want_dteacher, steep, "dteacher");
  close(dwt, want_dwt, steep, "dwt");
  if (s.bias) close(db, want_db, steep, "db");
  if (s.bias) close(dbt, want_dbt, steep, "dbt");
  if (dense) close(dscale, want_dscale, steep, "dscale");
}

}  // namespace

int main(int argc, char** argv) {
  if (!force_kernels(argc > 1 ? argv[1] : nullptr)) return 77;
  const Kernels& kernels = best_kernels();
  std::vector<Precision> precisions = {Precision::kFull};
  if (kernels.bf16) {
    precisions.push_back(Precision::kMixed);
    precisions.push_back(Precision::kBFloat16);
  }
  const std::pair<K, double> kinds[] = {{K::kForward, 0},
                                        {K::kReverse, 0},
                                        {K::kPower, 1},
                                        {K::kPower, 0.5},
                                        {K::kJensenShannon, 0.3},
                                        {K::kTotalVariation, 0},
                                        {K::kBernoulli, INFINITY},
                                        {K::kBernoulli, kLimit},
                                        {K::kBernoulliNorm, INFINITY},
                                        {K::kBernoulliNorm, kLimit},
                                        {K::kSquared, 0}};
  for (const auto& [kind, param] : kinds) {
    for (const Precision precision : precisions) {
      // a score that rounding moves past the limit has another slope
      if (param == kLimit && precision == Precision::kBFloat16) continue;
      check(kernels, kind, param, {3, 7, 5, 5, true, false, false, true, precision});
      check(kernels, kind, param, {19, 53, 24, 17, false, true, false, false, precision});
      check(kernels, kind, param, {37, 211, 33, 40, true, true, true, true, precision});
      check(kernels, kind, param, {21, 97, 24, 0, false, true, true, true, precision});
    }
    const bool smooth = kind != K::kPower && kind != K::kTotalVariation;
    for (const bool normalize : {false, true}) {
      for (const bool same : {false, true}) {
        if (!smooth) continue;
        check(kernels, kind, param,
              {9, 211, 24, 24, normalize, true, false, true, Precision::kFull, 1e-3, same});
      }
    }
  }
  check(kernels, K::kForward, 0, {261, 61, 8, 9, true, true, false, true, Precision::kFull});
  // sides that would have tiles of two sizes
  check(kernels, K::kForward, 0, {5, 211, 24, 1000, true, true, false, true, Precision::kFull});
  std::printf("%s: %d failures\n", kernels.capability, failures);
  return failures ? 1 : 0;
}
