// MaxSim without torch: score[q][b] = sum over query q's tokens of the largest product with a token
// of document b. Tokens lie one after another; offsets say where queries and documents begin.
#pragma once

#include "common.h"

namespace fused_losses {

struct MaxSimProblem {
  const void *queries, *documents;                  // [tokens, d] dense, queries float or double
  const int64_t *query_offsets, *document_offsets;  // [query_count + 1], [document_count + 1]
  int64_t query_count, document_count, d;
  bool is_double;
  Precision precision;
  Stored stored;  // how documents lie, and their gradients
  int64_t query_tokens() const { return query_offsets[query_count]; }
  int64_t document_tokens() const { return document_offsets[document_count]; }
};

struct MaxSimKernels {
  size_t (*forward_bytes)(const MaxSimProblem&, int threads);
  // scores [query_count, document_count] in the type of the tokens; index [query tokens,
  // document_count] which token of the document was largest, -1: the document is empty.
  void (*forward)(const MaxSimProblem&, void* scores, int32_t* index, void* buffer,
                  const Parallel&);
  // dqueries and ddocuments as the tokens lie, each may be null.
  void (*backward)(const MaxSimProblem&, const void* grad, const int32_t* index, void* dqueries,
                   void* ddocuments, const Parallel&);
};

}  // namespace fused_losses
