// The recurrences as plain loops in f64, for scans.cu: one thread per channel or column of a state.

template <class T>
__device__ double at(const void* p, i64 i) {
    return number(((const T*)p)[i]);
}
__device__ double sigmoid_of(double x) { return 1 / (1 + exp(-x)); }
__device__ double softplus_of(double x) { return x > 30 ? x : log1p(exp(x)); }

template <class T>
__global__ void plain(SelectiveScan p, double* state, double* y) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= p.channels) return;
    double h[64];
    i64 entry = (i64)blockIdx.y * p.channels + c;
    for (int n = 0; n < p.states; n++) h[n] = p.state[entry * p.states + n];
    for (int t = 0; t < p.tokens; t++) {
        i64 row = (i64)blockIdx.y * p.tokens + t;
        double u = at<T>(p.u, row * p.u_row + c), dt = softplus_of(at<T>(p.steps, row * p.steps_row + c) + p.bias[c]), sum = p.d[c] * u;
        for (int n = 0; n < p.states; n++) {
            h[n] = exp(dt * p.a[c * p.states + n]) * h[n] + dt * u * at<T>(p.b, row * p.b_row + n);
            sum += h[n] * at<T>(p.c, row * p.c_row + n);
        }
        double z = p.z ? at<T>(p.z, row * p.z_row + c) : 0;
        y[row * p.channels + c] = p.z ? sum * z * sigmoid_of(z) : sum;
    }
    for (int n = 0; n < p.states; n++) state[entry * p.states + n] = h[n];
}

template <class T>
__global__ void plain(Ssd p, double* state, double* y) {
    int j = threadIdx.x, head = blockIdx.x, group = head / (p.heads / p.groups);
    i64 base = ((i64)blockIdx.y * p.heads + head) * p.states * p.head_dim + j;
    double h[256];
    for (int n = 0; n < p.states; n++) h[n] = p.state[base + (i64)n * p.head_dim];
    for (int t = 0; t < p.tokens; t++) {
        i64 row = (i64)blockIdx.y * p.tokens + t;
        double dt = softplus_of(at<T>(p.steps, row * p.steps_row + head) + p.bias[head]);
        dt = fmin(fmax(dt, (double)p.step_min), (double)p.step_max);
        double x = at<T>(p.x, row * p.x_row + head * p.head_dim + j), sum = p.d[head] * x, decay = exp(dt * p.a[head]);
        for (int n = 0; n < p.states; n++) {
            h[n] = decay * h[n] + dt * x * at<T>(p.b, row * p.b_row + group * p.states + n);
            sum += h[n] * at<T>(p.c, row * p.c_row + group * p.states + n);
        }
        y[(row * p.heads + head) * p.head_dim + j] = sum;
    }
    for (int n = 0; n < p.states; n++) state[base + (i64)n * p.head_dim] = h[n];
}

template <class T>
__global__ void plain(Wkv p, double* state, double* y) {
    int j = threadIdx.x, head = blockIdx.x, first = head * p.dim;
    i64 base = ((i64)blockIdx.y * p.heads + head) * p.dim * p.dim + j;
    double s[128];
    for (int i = 0; i < p.dim; i++) s[i] = p.state[base + (i64)i * p.dim];
    for (int t = 0; t < p.tokens; t++) {
        i64 row = (i64)blockIdx.y * p.tokens + t;
        double sum = 0, v = at<T>(p.v, row * p.v_row + first + j);
        for (int i = 0; i < p.dim; i++) {
            double r = at<T>(p.r, row * p.r_row + first + i), kv = at<T>(p.k, row * p.k_row + first + i) * v, w = p.decay[first + i];
            if (p.w) w = exp(-exp(w + at<T>(p.w, row * p.w_row + first + i)));
            sum += r * (s[i] + p.u[first + i] * kv);
            s[i] = w * s[i] + kv;
        }
        y[row * p.heads * p.dim + first + j] = sum;
    }
    for (int i = 0; i < p.dim; i++) state[base + (i64)i * p.dim] = s[i];
}

template <class T>
__global__ void plain(Wkv7 p, double* state, double* y, double* own) {
    int j = threadIdx.x, head = blockIdx.x, first = head * p.dim;
    i64 base = ((i64)blockIdx.y * p.heads + head) * p.dim * p.dim + j;
    double s[128];
    for (int i = 0; i < p.dim; i++) s[i] = p.state[base + (i64)i * p.dim];
    for (int t = 0; t < p.tokens; t++) {
        i64 row = (i64)blockIdx.y * p.tokens + t;
        double sum = 0, v = at<T>(p.v, row * p.v_row + first + j), norm = 0, found = 0, share = 0;
        for (int i = 0; i < p.dim; i++) {
            double removal = at<T>(p.key, row * p.key_row + first + i) * p.removal_scale[first + i];
            norm += removal * removal, found += removal * s[i];
        }
        norm = fmax(sqrt(norm), 1e-12), found /= norm;
        for (int i = 0; i < p.dim; i++) {
            double key = at<T>(p.key, row * p.key_row + first + i), rate = sigmoid_of(at<T>(p.a, row * p.a_row + first + i) + p.rate_bias[first + i]);
            double k = key * (1 + (rate - 1) * p.key_rate[first + i]), added = rate * key * p.removal_scale[first + i] / norm;
            double w = exp(-exp(-0.5) * sigmoid_of(at<T>(p.w, row * p.w_row + first + i) + p.decay[first + i]));
            s[i] = w * s[i] - added * found + k * v;
            double r = at<T>(p.r, row * p.r_row + first + i);
            sum += r * s[i], share += r * k * p.own_scale[first + i];
        }
        if (own && j == 0) own[row * p.heads + head] = share;
        y[row * p.heads * p.dim + first + j] = sum;
    }
    for (int i = 0; i < p.dim; i++) state[base + (i64)i * p.dim] = s[i];
}

// state: numerators, denominators and largest exponents. The first two are multiplied by e^largest
// and the largest is set to 0, so that states can be compared.
template <class T>
__global__ void plain(Wkv4 p, double* state, double* y) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= p.channels) return;
    i64 entry = (i64)blockIdx.y * p.state_entry + c;
    double num = p.numerator[entry], den = p.denominator[entry], top = p.largest[entry];
    for (int t = 0; t < p.tokens; t++) {
        i64 row = (i64)blockIdx.y * p.tokens + t;
        double k = at<T>(p.k, row * p.k_row + c), v = at<T>(p.v, row * p.v_row + c), own = k + p.first[c];
        double m = fmax(top, own), a = exp(top - m), b = exp(own - m);
        y[row * p.channels + c] = (a * num + b * v) / (a * den + b);
        m = fmax(top + p.decay[c], k), a = exp(top + p.decay[c] - m), b = exp(k - m);
        num = a * num + b * v, den = a * den + b, top = m;
    }
    state[entry] = num, state[entry + p.channels] = den, state[entry + 2 * p.channels] = top;
}

template <class T>
__global__ void plain(RgLru p, double* state, double* y) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= p.channels) return;
    double h = p.state[(i64)blockIdx.y * p.channels + c];
    for (int t = 0; t < p.tokens; t++) {
        i64 row = (i64)blockIdx.y * p.tokens + t, g = (i64)(c / p.block) * p.block_stride + row * p.gate_row + c % p.block;
        double a = exp(p.decay[c] * sigmoid_of(at<T>(p.r, g) + p.r_bias[c]));
        double root = p.first && t == 0 ? 1 : sqrt(1 - a * a);
        h = a * h + root * sigmoid_of(at<T>(p.i, g) + p.i_bias[c]) * at<T>(p.x, row * p.x_row + c);
        double z = p.gate ? at<T>(p.gate, row * p.z_row + c) : 0;
        y[row * p.channels + c] = p.gate ? h * 0.5 * z * (1 + tanh(0.79788456080286536 * (z + 0.044715 * z * z * z))) : h;
    }
    state[(i64)blockIdx.y * p.channels + c] = h;
}

template <class T>
__global__ void plain(Conv p, double* state, double* y) {
    int c = blockIdx.x * blockDim.x + threadIdx.x, past = p.taps - 1;
    if (c >= p.channels) return;
    i64 row = (i64)blockIdx.y * p.tokens, states = (i64)blockIdx.y * past * p.channels + c;
    auto input = [&](int t) { return t >= 0 ? at<T>(p.x, (row + t) * p.x_row + c) : (double)p.state[states + (i64)(t + past) * p.channels]; };
    for (int t = 0; t < p.tokens; t++) {
        double sum = p.bias ? p.bias[c] : 0;
        for (int j = 0; j < p.taps; j++) sum += p.weight[j * p.channels + c] * input(t - past + j);
        y[(row + t) * p.channels + c] = p.silu ? sum * sigmoid_of(sum) : sum;
    }
    for (int j = 0; j < past; j++) state[states + (i64)j * p.channels] = input(p.tokens - past + j);
}
