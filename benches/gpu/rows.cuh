// The kernels of rows.cu for scans.cu: plain loops in f64 with one thread per row or number, inputs
// and launches.

template <class T>
__global__ void plain(Norm p, int rows, double* sum, double* y) {
    i64 row = blockIdx.x * (i64)blockDim.x + threadIdx.x, first = row * p.channels;
    if (row >= rows) return;
    double mean = 0, square = 0;
    for (i64 i = first; i < first + p.channels; i++) {
        sum[i] = p.x[i] + (p.added ? at<T>(p.added, i) : 0);
        mean += sum[i] / p.channels;
    }
    if (!p.bias) mean = 0;
    for (int c = 0; c < p.channels; c++) square += (sum[first + c] - mean) * (sum[first + c] - mean) / p.channels;
    for (int c = 0; c < p.channels; c++) {
        y[first + c] = (sum[first + c] - mean) / sqrt(square + p.eps) * p.weight[c] + (p.bias ? p.bias[c] : 0);
    }
}

// One thread per group.
template <class T>
__global__ void plain(GatedNorm p, int rows, double* y) {
    i64 thread = blockIdx.x * (i64)blockDim.x + threadIdx.x, row = thread / p.groups, first = thread * p.group;
    if (row >= rows) return;
    double square = 0;
    int channel = thread % p.groups * p.group;
    for (int c = 0; c < p.group; c++) {
        double gate = at<T>(p.gate, row * p.gate_row + channel + c);
        y[first + c] = at<T>(p.x, first + c) * gate * sigmoid_of(gate);
        square += y[first + c] * y[first + c] / p.group;
    }
    for (int c = 0; c < p.group; c++) y[first + c] *= p.weight[channel + c] / sqrt(square + p.eps);
}

// One thread per head.
template <class T>
__global__ void plain(HeadNorm p, double* y) {
    i64 head = blockIdx.x * (i64)blockDim.x + threadIdx.x, first = head * p.dim;
    if (head >= (i64)p.rows * p.heads) return;
    double mean = 0, square = 0;
    for (int c = 0; c < p.dim; c++) mean += at<T>(p.x, first + c) / p.dim;
    for (int c = 0; c < p.dim; c++) square += pow(at<T>(p.x, first + c) - mean, 2) / p.dim;
    for (int c = 0; c < p.dim; c++) {
        int channel = head % p.heads * p.dim + c;
        double x = (at<T>(p.x, first + c) - mean) / sqrt(square + p.eps) * p.weight[channel] + p.bias[channel];
        double gate = at<T>(p.gate, first + c);
        y[first + c] = (p.own ? x + p.own[head] * at<T>(p.v, first + c) : x) * (p.silu ? gate * sigmoid_of(gate) : gate);
    }
}

// One thread per channel of a row.
template <class T>
__global__ void plain(Shift p, int batch, double* last, double* y) {
    i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x, n = (i64)batch * p.tokens * p.channels;
    if (i >= n) return;
    i64 row = i / p.channels, state = row / p.tokens * p.channels + i % p.channels;
    double x = p.x[i], before = row % p.tokens ? p.x[i - p.channels] : p.before[state];
    for (int mix = 0; mix < p.mixes; mix++) {
        double weight = p.weights[mix * p.channels + i % p.channels] + (p.more ? at<T>(p.more, mix * n + i) : 0);
        y[mix * n + i] = x + (before - x) * weight;
    }
    if (row % p.tokens == p.tokens - 1) last[state] = x;
}

template <class T>
__global__ void plain(Gate p, double* y) {
    i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x, row = i / p.channels, c = i % p.channels;
    if (row >= p.rows) return;
    double z = at<T>(p.gate, row * p.gate_row + c) + (p.gate_bias ? p.gate_bias[c] : 0), x = at<T>(p.x, row * p.x_row + c) + (p.x_bias ? p.x_bias[c] : 0);
    double gelu = 0.5 * z * (1 + tanh(0.79788456080286536 * (z + 0.044715 * z * z * z)));
    double opened[] = {z * sigmoid_of(z), gelu, sigmoid_of(z), fmax(z, 0.)};
    y[i] = opened[p.function] * x;
}

template <class T>
__global__ void plain(Blend p, double* y) {
    i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x;
    if (i >= (i64)p.rows * p.channels) return;
    double x = at<T>(p.x, i);
    y[i] = x + (at<T>(p.other, i) - x) * sigmoid_of(at<T>(p.share, i) + p.bias[i % p.channels]);
}

// `y` contains the input.
template <class T>
__global__ void plain(Bias p, double* y) {
    i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x;
    if (i < (i64)p.rows * p.channels) y[i] = at<T>(p.y, i) + p.bias[i % p.channels];
}

// The inputs of a check or a time measurement, in addition to a kernel's arguments.
template <class P>
struct Of : P {
    int tokens;
};

template <class T, bool WIDE>
struct Norms {
    Of<Norm> p;
    int batch;
    Norms(int batch, int tokens, int channels, bool added, bool layer) : batch(batch) {
        i64 n = (i64)batch * tokens * channels;
        p = {{numbers<float>(n, 0.5, 1), added ? numbers<T>(n, 0, 1) : nullptr, numbers<float>(channels, 1, 0.3),
              layer ? numbers<float>(channels, 0, 0.3) : nullptr, WIDE ? (void*)poisoned<float>(n) : (void*)poisoned<T>(n), channels, 1e-5f}, tokens};
    }
    void run() {
        auto kernel = WIDE ? PICK(T, rows_norm_wide) : PICK(T, rows_norm);
        kernel<<<batch * p.tokens, NORM_THREADS, 4 * p.channels>>>(p);
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)batch * p.tokens * p.channels; }
    i64 states() { return outputs(); }
    void plainly(double* sum, double* y) { plain<T><<<parts(batch * p.tokens, 32), 32>>>(p, batch * p.tokens, sum, y); }
    double bytes() { return outputs() * ((p.added ? 8. + sizeof(T) : 4.) + (WIDE ? 4 : sizeof(T))); }
};

template <class T>
struct GatedNorms {
    Of<GatedNorm> p;
    int batch;
    GatedNorms(int batch, int tokens, int groups, int group, int pad) : batch(batch) {
        i64 n = (i64)batch * tokens;
        int width = groups * group;
        p = {{numbers<T>(n * width, 0, 1), rows<T>(n, width, pad, 0, 1), numbers<float>(width, 1, 0.3), poisoned<T>(n * width), groups, group, width + pad,
              1e-5f}, tokens};
    }
    void run() {
        PICK(T, rows_gated_norm)<<<dim3(batch * p.tokens, p.groups), NORM_THREADS, 4 * p.group>>>(p);
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)batch * p.tokens * p.groups * p.group; }
    i64 states() { return 0; }
    void plainly(double*, double* y) { plain<T><<<parts((i64)batch * p.tokens * p.groups, 32), 32>>>(p, batch * p.tokens, y); }
    double bytes() { return outputs() * 3. * sizeof(T); }
};

template <class T>
struct HeadNorms {
    Of<HeadNorm> p;
    int batch;
    HeadNorms(int batch, int tokens, int heads, int dim, bool own) : batch(batch) {
        i64 rows = (i64)batch * tokens, n = rows * heads * dim;
        p = {{numbers<T>(n, 0, 1), numbers<T>(n, 0, 1), numbers<float>(heads * dim, 1, 0.3), numbers<float>(heads * dim, 0, 0.3),
              own ? numbers<float>(rows * heads, 0, 1) : nullptr, own ? numbers<T>(n, 0, 1) : nullptr, poisoned<T>(n), int(rows), heads, dim, !own, 64e-5f},
             tokens};
    }
    void run() {
        int lanes = 1;
        while (lanes * 8 < p.dim) lanes *= 2;
        PICK(T, rows_head_norm)<<<parts((i64)p.rows * p.heads * lanes, 128), 128>>>(p);
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)p.rows * p.heads * p.dim; }
    i64 states() { return 0; }
    void plainly(double*, double* y) { plain<T><<<parts((i64)p.rows * p.heads, 32), 32>>>(p, y); }
    double bytes() { return outputs() * (p.own ? 4. : 3.) * sizeof(T); }
};

template <class T>
struct Shifts {
    Of<Shift> p;
    int batch;
    Shifts(int batch, int tokens, int channels, int mixes, bool more) : batch(batch) {
        i64 n = (i64)batch * tokens * channels;
        p = {{numbers<float>(n, 0, 1), numbers<float>((i64)batch * channels, 0, 1), poisoned<float>((i64)batch * channels),
              numbers<float>(mixes * channels, 0.5, 0.3), more ? numbers<T>(mixes * n, 0, 1) : nullptr, poisoned<T>(mixes * n), tokens, channels, mixes},
             tokens};
    }
    void run() {
        PICK(T, rows_shift)<<<dim3(parts(p.channels, 1024), parts(p.tokens, 4), batch), 128>>>(p);
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)p.mixes * batch * p.tokens * p.channels; }
    i64 states() { return (i64)batch * p.channels; }
    void plainly(double* last, double* y) { plain<T><<<parts((i64)batch * p.tokens * p.channels, 256), 256>>>(p, batch, last, y); }
    double bytes() { return outputs() * (4. / p.mixes + (p.more ? 2. : 1.) * sizeof(T)) + states() * 8.; }
};

template <class T>
struct Gates {
    Of<Gate> p;
    int batch;
    Gates(int batch, int tokens, int channels, int pad, int function, bool biased) : batch(batch) {
        i64 n = (i64)batch * tokens;
        auto bias = [&] { return biased ? numbers<float>(channels, 0, 1) : nullptr; };
        p = {{rows<T>(n, channels, pad, 0, 1), rows<T>(n, channels, pad, 0, 1), bias(), bias(), poisoned<T>(n * channels), int(n), channels, channels + pad,
              channels + pad, function}, tokens};
    }
    void run() {
        PICK(T, rows_gate)<<<parts((i64)p.rows * parts(p.channels, 8), 256), 256>>>(p);
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)p.rows * p.channels; }
    i64 states() { return 0; }
    void plainly(double*, double* y) { plain<T><<<parts(outputs(), 256), 256>>>(p, y); }
    double bytes() { return outputs() * 3. * sizeof(T); }
};

template <class T>
struct Blends {
    Of<Blend> p;
    int batch;
    Blends(int batch, int tokens, int channels) : batch(batch) {
        i64 n = (i64)batch * tokens * channels;
        p = {{numbers<T>(n, 0, 1), numbers<T>(n, 0, 1), numbers<T>(n, 0, 1), numbers<float>(channels, 0, 1), poisoned<T>(n), batch * tokens, channels}, tokens};
    }
    void run() {
        PICK(T, rows_blend)<<<parts((i64)p.rows * parts(p.channels, 8), 256), 256>>>(p);
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)p.rows * p.channels; }
    i64 states() { return 0; }
    void plainly(double*, double* y) { plain<T><<<parts(outputs(), 256), 256>>>(p, y); }
    double bytes() { return outputs() * 4. * sizeof(T); }
};

template <class T>
struct Biases {
    Of<Bias> p;
    int batch;
    Biases(int batch, int tokens, int channels) : batch(batch) {
        i64 n = (i64)batch * tokens * channels;
        p = {{numbers<T>(n, 0, 1), numbers<float>(channels, 0, 1), batch * tokens, channels}, tokens};
    }
    void run() {
        PICK(T, rows_bias)<<<parts((i64)p.rows * parts(p.channels, 8), 256), 256>>>(p);
        OK(cudaGetLastError());
    }
    i64 outputs() { return (i64)p.rows * p.channels; }
    i64 states() { return 0; }
    void plainly(double*, double* y) { plain<T><<<parts(outputs(), 256), 256>>>(p, y); }
    double bytes() { return outputs() * 2. * sizeof(T); }
};
