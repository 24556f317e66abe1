// Compares the kernels over dense blocks with plain ones in f64, and times decode attention. Needs
// only CUDA.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -I crates/cuda/include -I crates/kernels -o paged benches/gpu/paged.cu
//     ./paged check && ./paged time
//
// `small` instead of `check` runs few shapes, for compute-sanitizer. Blocks are in random order.
// Entries are appended twice, the second time as a selection per head; then some are evicted.
// Outputs are filled with NaN. Attention is a captured launch whose work lists are written after
// the capture.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/paged.cu"

void ok(cudaError_t error, int line) {
    if (error == cudaSuccess) return;
    printf("line %d: %s\n", line, cudaGetErrorString(error));
    exit(1);
}
#define OK(call) ok(call, __LINE__)

typedef long long i64;
std::mt19937 draw(7);

template <class T>
struct Array {
    T* p = nullptr;
    size_t n = 0;
    explicit Array(size_t count) : n(count) { OK(cudaMalloc(&p, std::max<size_t>(1, n) * sizeof(T))), OK(cudaMemset(p, 0xff, std::max<size_t>(1, n) * sizeof(T))); }
    explicit Array(const std::vector<T>& x) : Array(x.size()) { put(x); }
    Array(const Array&) = delete;
    ~Array() { cudaFree(p); }
    void put(const std::vector<T>& x) { OK(cudaMemcpy(p, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice)); }
    std::vector<T> get() const {
        std::vector<T> x(n);
        OK(cudaMemcpy(x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return x;
    }
};

uint16_t bits_of(float x, bool bf16) {
    uint16_t y;
    if (bf16) { __nv_bfloat16 z = __float2bfloat16(x); memcpy(&y, &z, 2); }
    else { __half z = __float2half(x); memcpy(&y, &z, 2); }
    return y;
}
float number_of(uint16_t x, bool bf16) {
    if (bf16) { __nv_bfloat16 z; memcpy(&z, &x, 2); return __bfloat162float(z); }
    __half z; memcpy(&z, &x, 2); return __half2float(z);
}

std::vector<uint16_t> noise(size_t n, bool bf16) {
    std::normal_distribution<float> normal;
    std::vector<uint16_t> x(n);
    for (auto& y : x) y = bits_of(normal(draw), bf16);
    return x;
}

struct Kernels {
    void (*attend[2])(const AttendArgs);  // of 8 and 16 columns
    void (*sums)(const SumsArgs);
    int threads, shared, sums_shared;
};

template <class Pair, int D, int N>
__global__ void __launch_bounds__(Rings<D>::THREADS) attend_kernel(const AttendArgs a) { attend<Pair, D, N>(a); }
template <class Pair, int D>
__global__ void __launch_bounds__(SUMS_THREADS) sums_kernel(const SumsArgs a) { sums<Pair, D>(a); }

template <class Pair, int D>
Kernels kernels() {
    Kernels k{{attend_kernel<Pair, D, 1>, attend_kernel<Pair, D, 2>}, sums_kernel<Pair, D>, Rings<D>::THREADS, Rings<D>::BYTES, 2 * 2 * PAGE * (D + 8)};
    OK(cudaFuncSetAttribute(k.sums, cudaFuncAttributeMaxDynamicSharedMemorySize, k.sums_shared));
    for (auto attend : k.attend) OK(cudaFuncSetAttribute(attend, cudaFuncAttributeMaxDynamicSharedMemorySize, k.shared));
    return k;
}

template <int D>
Kernels of(bool bf16) { return bf16 ? kernels<__nv_bfloat162, D>() : kernels<__half2, D>(); }

Kernels kernels_of(int d, bool bf16) {
    switch (d) {
        case 64: return of<64>(bf16);
        case 80: return of<80>(bf16);
        case 96: return of<96>(bf16);
        case 128: return of<128>(bf16);
        case 192: return of<192>(bf16);
        default: return of<256>(bf16);
    }
}

// The same plan as in src/paged/plan.rs. Returns the numbers of partial results and of merges.
std::pair<int, int> plan(const std::vector<AttendWork>& heads, int per, int columns, int slots, std::vector<AttendWork>& work) {
    std::vector<AttendWork> rows;
    i64 total = 0;
    auto pages = [](const AttendWork& w) { return (w.to - w.from + PAGE - 1) / PAGE; };
    for (auto& head : heads)
        for (int c = 0; c < per * head.queries; c += columns) rows.push_back(head), rows.back().first_column = c, total += pages(head);
    int parts = 0, merge = 0;
    for (auto& row : rows) {
        int n = pages(row), splits = std::max<i64>(1, std::min<i64>(std::max(1, n), ((i64)n * slots + total / 2) / std::max<i64>(1, total)));
        for (int s = 0; s < splits; s++) {
            AttendWork w = row;
            w.from = std::min(row.to, row.from + n * s / splits * PAGE), w.to = std::min(row.to, row.from + n * (s + 1) / splits * PAGE);
            w.first_part = parts, w.part = s, w.parts = splits, w.merge = merge;
            work.push_back(w);
        }
        parts += splits, merge++;
    }
    std::sort(work.begin(), work.end(), [](auto& a, auto& b) { return a.to - a.from > b.to - b.from; });
    return {parts, merge};
}

int slots_of(const Kernels& k, void (*kernel)(const AttendArgs)) {
    int per_sm = 0, sms = 0;
    OK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, k.threads, k.shared));
    return per_sm * sms;
}

struct Shape {
    int d, kv_heads, per;
    bool bf16;
    std::vector<int> lens, queries;  // of each sequence
    int causal, window;
    float soft_cap;
    bool listed;  // every second run of 10 entries is seen
};

int failures = 0, cases = 0;
double worst_out = 0, worst_sums = 0;

void fail(const Shape& s, const char* what, double error) {
    failures++;
    printf("WRONG %s: d %d kv %d x %d bf16 %d seqs %zu longest %d queries %d causal %d window %d cap %g listed %d: %.2e\n", what, s.d, s.kv_heads, s.per, s.bf16, s.lens.size(),
           *std::max_element(s.lens.begin(), s.lens.end()), s.queries[0], s.causal, s.window, s.soft_cap, s.listed, error);
}

void check(const Shape& s) {
    const int d = s.d, seqs = s.lens.size(), heads = s.kv_heads * s.per, rows = seqs * s.kv_heads, pieces = d / 8;
    const size_t block = 2 * PAGE * d;
    Kernels k = kernels_of(d, s.bf16);
    // The host's copy of the entries of each kv head.
    std::vector<std::vector<uint16_t>> keys(rows), values(rows);
    std::vector<int> starts(seqs + 1, 0), query_starts(seqs + 1, 0);
    for (int i = 0; i < seqs; i++) starts[i + 1] = starts[i] + s.lens[i] + 5, query_starts[i + 1] = query_starts[i] + s.queries[i];
    const int tokens = starts[seqs], all_queries = query_starts[seqs];
    auto k_rows = noise((size_t)tokens * s.kv_heads * d, s.bf16), v_rows = noise((size_t)tokens * s.kv_heads * d, s.bf16), q_rows = noise((size_t)all_queries * heads * d, s.bf16);
    Array<uint16_t> k_on(k_rows), v_on(v_rows), q_on(q_rows);
    int most = 0;
    for (int len : s.lens) most = std::max(most, (len + 5) / PAGE + 2);
    std::vector<uint32_t> order(rows * most);
    std::iota(order.begin(), order.end(), 0), std::shuffle(order.begin(), order.end(), draw);
    Array<uint16_t> pool(order.size() * block);
    auto address = [&](int row, int place) { return (uint64_t)(pool.p + order[row * most + place] * block); };
    Array<uint64_t> table(rows * most);
    std::vector<uint64_t*> tables(rows);
    for (int r = 0; r < rows; r++) tables[r] = table.p + r * most;
    Array<uint64_t*> tables_on(tables);
    // Two appends: the first half of the tokens, then four of every five of the others.
    std::vector<int> held(rows, 0);
    for (int part = 0; part < 2; part++) {
        std::vector<AppendRow> list(rows);
        std::vector<uint64_t> new_blocks;
        std::vector<uint32_t> selected;
        std::vector<size_t> selected_at(rows);
        int longest = 0;
        for (int r = 0; r < rows; r++) {
            int seq = r / s.kv_heads, head = r % s.kv_heads, len = s.lens[seq] + 5, half = len / 2;
            AppendRow& row = list[r];
            row = {};
            std::vector<int> taken;
            if (!part) for (int t = 0; t < half; t++) taken.push_back(t);
            else for (int t = half; t < len; t++) if ((t + head) % 5 || len < 12) taken.push_back(t);
            row.first = held[r], row.count = taken.size(), row.first_new_block = (held[r] + PAGE - 1) / PAGE;
            row.table = r, row.kv_head = head, row.first_token = starts[seq], row.seqlen = len;
            row.new_blocks = new_blocks.size(), selected_at[r] = selected.size();
            for (int b = row.first_new_block; b * PAGE < held[r] + row.count; b++) new_blocks.push_back(address(r, b)), row.new_block_count++;
            for (int t : taken) {
                size_t at = ((size_t)(starts[seq] + t) * s.kv_heads + head) * d;
                keys[r].insert(keys[r].end(), k_rows.begin() + at, k_rows.begin() + at + d), values[r].insert(values[r].end(), v_rows.begin() + at, v_rows.begin() + at + d);
                selected.push_back(t);
            }
            held[r] += row.count, longest = std::max(longest, row.count);
        }
        Array<uint64_t> new_blocks_on(new_blocks);
        Array<uint32_t> selected_on(selected);
        for (int r = 0; r < rows; r++) list[r].tokens = part ? selected_on.p + selected_at[r] : nullptr;
        Array<AppendRow> on(list);
        const i64 token = s.kv_heads * pieces;
        AppendArgs a{k_on.p, v_on.p, on.p, tables_on.p, new_blocks_on.p, token, pieces, token, pieces, pieces, 0};
        if (longest) paged_append<<<dim3((longest * pieces + APPEND_THREADS - 1) / APPEND_THREADS, rows, 2), APPEND_THREADS>>>(a);
        OK(cudaDeviceSynchronize());
    }
    // Some entries are evicted, different ones for each head, and the rest are moved together.
    {
        std::vector<MoveRow> list(rows);
        std::vector<uint32_t> entries;
        std::vector<size_t> at(rows);
        for (int r = 0; r < rows; r++) {
            std::vector<uint32_t> keep;
            int step = 3 + r % 4;
            for (int e = 0; e < held[r]; e++) if (held[r] < 12 || e < 7 || e % (7 * step) >= step) keep.push_back(e);
            int first = 0;
            while (first < (int)keep.size() && keep[first] == (uint32_t)first) first++;
            at[r] = entries.size(), list[r] = {table.p + r * most, table.p + r * most, nullptr, first, (int)keep.size() - first, held[r], 0};
            entries.insert(entries.end(), keep.begin() + first, keep.end());
            std::vector<uint16_t> nk, nv;
            for (uint32_t e : keep) nk.insert(nk.end(), keys[r].begin() + e * d, keys[r].begin() + (e + 1) * d), nv.insert(nv.end(), values[r].begin() + e * d, values[r].begin() + (e + 1) * d);
            keys[r] = nk, values[r] = nv, held[r] = keep.size();
        }
        Array<uint32_t> on(entries);
        for (int r = 0; r < rows; r++) list[r].entries = on.p + at[r];
        Array<MoveRow> rows_on(list);
        paged_move<<<dim3((pieces + MOVE_PIECES - 1) / MOVE_PIECES, rows, 2), MOVE_THREADS>>>({rows_on.p, pieces, 0});
        OK(cudaDeviceSynchronize());
        auto blocks = pool.get();
        for (int r = 0; r < rows; r++)
            for (int e = 0; e < held[r]; e++) {
                const uint16_t* b = blocks.data() + order[r * most + e / PAGE] * block + e % PAGE * d;
                if (memcmp(b, keys[r].data() + (size_t)e * d, 2 * d) || memcmp(b + PAGE * d, values[r].data() + (size_t)e * d, 2 * d)) return fail(s, "blocks", e);
            }
    }
    // Attention and attention sums.
    std::vector<std::vector<uint32_t>> lists(rows);
    std::vector<uint32_t> flat;
    for (int r = 0; r < rows; r++)
        for (int e = 0; e < held[r]; e++) if (!s.listed || e / 10 % 2 == 0) lists[r].push_back(e), flat.push_back(e);
    Array<uint32_t> flat_on(flat);
    std::vector<AttendWork> all;
    std::vector<SumsWork> sums_work;
    i64 sums_total = 0;
    size_t flat_at = 0;
    int longest = 0, most_queries = 0;
    for (int r = 0; r < rows; r++) {
        int seq = r / s.kv_heads, len = lists[r].size(), q = s.queries[seq];
        int from = s.causal && s.window ? std::max(0, len + 1 - q - s.window) / TILE * TILE : 0;
        AttendWork one = {};
        one.entries = s.listed ? flat_on.p + flat_at : nullptr, one.table = r, one.len = one.to = len, one.from = from;
        one.kv_head = r % s.kv_heads, one.queries = q, one.first_token = query_starts[seq];
        all.push_back(one);
        sums_work.push_back({table.p + r * most, nullptr, 0, sums_total, held[r], r % s.kv_heads, q, query_starts[seq]});
        sums_total += (i64)s.per * held[r], flat_at += len, longest = std::max(longest, held[r]), most_queries = std::max(most_queries, q);
    }
    const int n = s.per * most_queries > 8 ? 2 : 1, columns = 8 * n;
    auto attend_k = k.attend[n - 1];
    std::vector<AttendWork> work;
    auto [parts, merges] = plan(all, s.per, columns, slots_of(k, attend_k), work);
    // Two items more than needed, to test unused items.
    work.resize(work.size() + 2);
    Array<AttendWork> work_on(work.size());
    OK(cudaMemset(work_on.p, 0, work.size() * sizeof(AttendWork)));
    Array<unsigned> arrived(std::vector<unsigned>(merges, 0));
    Array<float> out((size_t)all_queries * heads * d), lse(all_queries * heads), part_out((size_t)parts * columns * d), part_max(parts * columns), part_sum(parts * columns), got_sums(sums_total);
    AttendArgs a{q_on.p, out.p, lse.p, part_out.p, part_max.p, part_sum.p, arrived.p, work_on.p, tables_on.p, heads, s.per, s.causal, s.window, 1.f / sqrtf(d), s.soft_cap, d, 2};
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    OK(cudaStreamCreate(&stream)), OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    attend_k<<<work.size(), k.threads, k.shared, stream>>>(a);
    OK(cudaStreamEndCapture(stream, &graph)), OK(cudaGraphInstantiate(&ready, graph, 0));
    work_on.put(work);
    // Twice: the first launch must leave `arrived` as it was.
    for (int i = 0; i < 2; i++) OK(cudaGraphLaunch(ready, stream)), OK(cudaStreamSynchronize(stream));
    OK(cudaGraphExecDestroy(ready)), OK(cudaGraphDestroy(graph)), OK(cudaStreamDestroy(stream));
    Array<SumsWork> sums_on(sums_work);
    bool sums_too = !s.listed;
    if (sums_too) {
        SumsArgs b{q_on.p, lse.p, got_sums.p, sums_on.p, heads, s.per, s.causal, s.window, a.scale, s.soft_cap};
        k.sums<<<dim3((longest + PAGE - 1) / PAGE, rows, most_queries > 1 ? s.per : 1), SUMS_THREADS, k.sums_shared>>>(b);
        OK(cudaDeviceSynchronize());
    }
    auto got = out.get(), got_lse = lse.get(), sums = got_sums.get();
    double diff = 0, norm = 0, lse_off = 0, sums_diff = 0, sums_norm = 0;
    for (int r = 0; r < rows; r++) {
        int seq = r / s.kv_heads, head0 = r % s.kv_heads * s.per, len = lists[r].size(), q = s.queries[seq];
        std::vector<double> total((size_t)s.per * held[r], 0);
        for (int h = 0; h < s.per; h++)
            for (int i = 0; i < q; i++) {
                i64 row = (i64)(query_starts[seq] + i) * heads + head0 + h;
                int to = s.causal ? len - q + 1 + i : len, from = s.causal && s.window ? std::max(0, to - s.window) : 0;
                std::vector<double> score(len, -INFINITY), want(d, 0);
                double top = -INFINITY, sum = 0;
                for (int e = from; e < to; e++) {
                    double x = 0;
                    for (int c = 0; c < d; c++) x += (double)number_of(q_rows[row * d + c], s.bf16) * number_of(keys[r][(size_t)lists[r][e] * d + c], s.bf16);
                    x *= a.scale;
                    if (s.soft_cap > 0) x = s.soft_cap * tanh(x / s.soft_cap);
                    score[e] = x, top = std::max(top, x);
                }
                for (int e = from; e < to; e++) sum += exp(score[e] - top);
                for (int e = from; e < to; e++) {
                    double p = exp(score[e] - top) / sum;
                    total[(size_t)h * held[r] + lists[r][e]] += p;
                    for (int c = 0; c < d; c++) want[c] += p * number_of(values[r][(size_t)lists[r][e] * d + c], s.bf16);
                }
                double l = to > from ? top + log(sum) : -INFINITY, off = l == got_lse[row] ? 0 : fabs(l - got_lse[row]);
                lse_off = off <= lse_off ? lse_off : off;
                for (int c = 0; c < d; c++) diff += pow(got[row * d + c] - want[c], 2), norm += want[c] * want[c];
            }
        if (sums_too)
            for (size_t i = 0; i < total.size(); i++) sums_diff += pow(sums[sums_work[r].out + i] - total[i], 2), sums_norm += total[i] * total[i];
    }
    double error = sqrt(diff / std::max(norm, 1e-30)), sums_error = sqrt(sums_diff / std::max(sums_norm, 1e-30)), limit = 1e-3;
    cases++;
    worst_out = std::max(worst_out, error), worst_sums = std::max(worst_sums, sums_error);
    if (!(error <= limit)) fail(s, "attention", error);
    if (!(lse_off <= 1e-3)) fail(s, "log-sum-exp", lse_off);
    if (!(sums_error <= limit)) fail(s, "sums", sums_error);
}

double median_ms(int count, const std::function<void(int)>& f) {
    std::vector<cudaEvent_t> events(2 * count);
    for (auto& e : events) OK(cudaEventCreate(&e));
    for (int i = 0; i < 5; i++) f(i);
    for (int i = 0; i < count; i++) OK(cudaEventRecord(events[2 * i])), f(i), OK(cudaEventRecord(events[2 * i + 1]));
    OK(cudaDeviceSynchronize());
    std::vector<float> times(count);
    for (int i = 0; i < count; i++) OK(cudaEventElapsedTime(&times[i], events[2 * i], events[2 * i + 1]));
    for (auto& e : events) OK(cudaEventDestroy(e));
    std::sort(times.begin(), times.end());
    return times[count / 2];
}

void time_decode(const char* name, std::vector<int> lens, int kv_heads, int per, double copy) {
    const int d = 128, seqs = lens.size(), heads = kv_heads * per;
    const size_t block = 2 * PAGE * d;
    Kernels k = kernels_of(d, false);
    size_t blocks = 0, entries = 0;
    for (int len : lens) blocks += (size_t)kv_heads * ((len + PAGE - 1) / PAGE), entries += (size_t)kv_heads * len;
    const int copies = std::max<size_t>(1, (200ull << 20) / (blocks * block * 2) + 1);
    Array<uint16_t> pool(blocks * copies * block);
    auto some = noise(1 << 20, false);
    for (size_t at = 0; at < pool.n; at += some.size())
        OK(cudaMemcpy(pool.p + at, some.data(), std::min(some.size(), pool.n - at) * 2, cudaMemcpyHostToDevice));
    Array<uint16_t> q(noise((size_t)seqs * heads * d, false));
    std::vector<uint64_t> table(blocks * copies);
    std::vector<uint32_t> order(blocks * copies);
    std::iota(order.begin(), order.end(), 0), std::shuffle(order.begin(), order.end(), draw);
    for (size_t i = 0; i < table.size(); i++) table[i] = (uint64_t)(pool.p + order[i] * block);
    Array<uint64_t> table_on(table);
    const int n = per > 8 ? 2 : 1, columns = 8 * n;
    auto attend_k = k.attend[n - 1];
    std::vector<AttendWork> work;
    std::vector<uint64_t*> tables;
    size_t work_of_copy = 0, at = 0;
    int parts = 0, merges = 0;
    for (int copy = 0; copy < copies; copy++) {
        std::vector<AttendWork> all, part;
        for (int seq = 0; seq < seqs; seq++)
            for (int head = 0; head < kv_heads; head++) {
                AttendWork one = {};
                one.table = tables.size(), one.len = one.to = lens[seq], one.kv_head = head, one.queries = 1, one.first_token = seq;
                all.push_back(one), tables.push_back(table_on.p + at), at += (lens[seq] + PAGE - 1) / PAGE;
            }
        std::tie(parts, merges) = plan(all, per, columns, slots_of(k, attend_k), part);
        work.insert(work.end(), part.begin(), part.end()), work_of_copy = part.size();
    }
    Array<AttendWork> work_on(work);
    Array<uint64_t*> tables_on(tables);
    Array<unsigned> arrived(std::vector<unsigned>(merges, 0));
    Array<float> out((size_t)seqs * heads * d), lse(seqs * heads), part_out((size_t)parts * columns * d), part_max(parts * columns), part_sum(parts * columns);
    double ms = median_ms(40, [&](int i) {
        AttendArgs a{q.p, out.p, lse.p, part_out.p, part_max.p, part_sum.p, arrived.p, work_on.p + i % copies * work_of_copy, tables_on.p, heads, per, 1, 0, .1f, 0.f, d, 2};
        attend_k<<<work_of_copy, k.threads, k.shared>>>(a);
    });
    OK(cudaGetLastError());
    double gbs = entries * d * 4. / ms * 1e-6;
    printf("%-34s heads %2d/%2d, pieces %5zu | %8.4f ms %6.0f GB/s %5.1f%%\n", name, heads, kv_heads, work_of_copy, ms, gbs, 100 * gbs / copy);
}

int main(int count, char** words) {
    std::string what = count > 1 ? words[1] : "check";
    if (what != "time") {
        bool small = what == "small";
        for (int d : {64, 80, 96, 128, 192, 256})
            for (bool bf16 : {false, true}) {
                if (small && (bf16 || (d != 80 && d != 128))) continue;
                for (auto [kv, per] : {std::pair{2, 1}, {2, 4}, {1, 3}, {1, 16}}) {
                    if (small && per != 4) continue;
                    check({d, kv, per, bf16, {1, 300, 64, 1000}, {1, 1, 1, 1}, 1, 0, 0.f, false});
                    check({d, kv, per, bf16, {500, 40, 129}, {17, 1, 70}, 1, 0, 0.f, false});
                    check({d, kv, per, bf16, {400, 63}, {3, 2}, 1, 100, 3.f, false});
                    check({d, kv, per, bf16, {400, 1, 200}, {1, 1, 1}, 0, 0, 0.f, true});
                }
                if (!small && d == 128) check({d, 2, 4, bf16, {9000, 100}, {1, 1}, 1, 0, 0.f, false});
            }
        printf("%d cases, %d failures; worst error of attention %.2e, of sums %.2e\n", cases, failures, worst_out, worst_sums);
        return failures > 0;
    }
    size_t n = 4ull << 30;
    char *x, *y;
    OK(cudaMalloc(&x, n)), OK(cudaMalloc(&y, n)), OK(cudaMemset(x, 1, n));
    double copy = 2. * n / median_ms(20, [&](int) { OK(cudaMemcpyAsync(y, x, n, cudaMemcpyDeviceToDevice)); }) * 1e-6;
    OK(cudaFree(x)), OK(cudaFree(y));
    printf("copy: %.0f GB/s\n", copy);
    for (auto [kv, per] : {std::pair{32, 1}, {8, 4}}) {
        for (int t : {4096, 32768, 131072}) time_decode(("1 x " + std::to_string(t)).c_str(), {t}, kv, per, copy);
        time_decode("8 x 32768", std::vector<int>(8, 32768), kv, per, copy);
    }
    time_decode("16 x 16384", std::vector<int>(16, 16384), 8, 4, copy);
    time_decode("32 x 16384", std::vector<int>(32, 16384), 8, 4, copy);
    std::vector<int> unequal(32, 2048);
    unequal[9] = 131072;
    time_decode("1 x 131072 + 31 x 2048", unequal, 8, 4, copy);
    return 0;
}
