/* Squared singular values of many small matrices, one in each lane of a vector: see singular_values.py.

   For each matrix S [rows, cols], rows >= cols, in float64:
     G = S^T S                          lower triangle, packed by rows
     T = Q^T G Q, tridiagonal           Householder, from the last row up (Golub & Van Loan, section 8.3)
     eigenvalues of T                   root-free QL (Pal, Walker & Kahan; LAPACK's dsterf), no vectors
   A library call handles one matrix at a time and is bound by latencies at these sizes. Here LANES matrices go through
   the same instructions. The lanes differ in one thing, the number of QL sweeps: all sweep until the last is done. */

#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 8
#elif defined(__AVX__)
#define LANES 4
#else
#define LANES 2
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE 4 /* rows worked on at once: 32 registers */
#else
#define TILE 2
#endif
#define GROUPS 4     /* vectors that sweep side by side: divisions have long latencies */
#define BLOCK 32     /* rows of S that are laid out at a time */
#define PENDING 2    /* reflections gathered before G, which lies in the second cache, is rewritten */
#define MAX_SWEEPS 60
#define EPS2 4.93e-32 /* squared rounding error of a double */

typedef double vec __attribute__((vector_size(8 * LANES)));
typedef long long mask __attribute__((vector_size(8 * LANES)));

static const vec zero = {0};

static inline vec pick(mask where, vec a, vec b) { return (vec)((where & (mask)a) | (~where & (mask)b)); }

static inline vec root(vec x) {
    for (int l = 0; l < LANES; l++) x[l] = __builtin_sqrt(x[l]);
    return x;
}

static inline size_t row(int i) { return (size_t)i * (i + 1) / 2; }

/* Rows [0, count) of LANES matrices, wide doubles or else floats, to x: panels of TILE columns, [panel][BLOCK][TILE]. */
static void lay_out(const char *const *from, int wide, vec *x, int count, int cols) {
    for (int r = 0; r < count; r++)
        for (int c = 0; c < cols; c++) {
            long at = (long)r * cols + c;
            vec y;
            for (int l = 0; l < LANES; l++)
                y[l] = wide ? ((const double *)from[l])[at] : ((const float *)from[l])[at];
            x[(c / TILE * BLOCK + r) * TILE + c % TILE] = y;
        }
}

/* G = X^T X over the rows of x, or G += X^T X. */
static void gram(const vec *restrict x, vec *restrict g, int count, int cols, int add) {
    for (int i = 0; i < cols; i += TILE)
        for (int j = 0; j <= i; j += TILE) {
            vec s[TILE][TILE] = {{{0}}};
            const vec *p = x + i * BLOCK, *q = x + j * BLOCK;
            for (int r = 0; r < count; r++, p += TILE, q += TILE)
                for (int a = 0; a < TILE; a++)
                    for (int b = 0; b < TILE; b++) s[a][b] += p[a] * q[b];
            for (int a = 0; a < TILE && i + a < cols; a++)
                for (int b = 0; b < TILE && j + b <= i + a; b++) {
                    vec *to = g + row(i + a) + j + b;
                    *to = add ? *to + s[a][b] : s[a][b];
                }
        }
}

/* w, beta with (I - beta w w^T) x = (0, ..., 0, alpha); returns alpha. x, w [m]. */
static vec reflector(const vec *restrict x, vec *restrict w, int m, vec *beta) {
    vec square = zero;
    for (int j = 0; j < m; j++) {
        w[j] = x[j];
        square += x[j] * x[j];
    }
    vec last = x[m - 1], norm = root(square), alpha = pick(last >= 0, -norm, norm);
    vec h = square - alpha * last;
    w[m - 1] = last - alpha;
    *beta = pick(h > 0, 1.0 / pick(h > 0, h, zero + 1.0), zero);
    return alpha;
}

/* G -= sum_k u_k q_k^T + q_k u_k^T for `count` pairs (rows of u and q, `stride` apart), and p = G w; leading m rows. */
static inline __attribute__((always_inline)) void pass(vec *restrict g, int m, int count, int stride,
                                                       const vec *restrict u, const vec *restrict q,
                                                       const vec *restrict w, vec *restrict p) {
    for (int j = 0; j < m; j++) p[j] = zero;
    int r = 0;
    for (; r + TILE <= m; r += TILE) {
        vec *a[TILE], s[TILE], wr[TILE], ur[PENDING][TILE], qr[PENDING][TILE], corner[TILE][TILE];
        for (int i = 0; i < TILE; i++) {
            a[i] = g + row(r + i);
            s[i] = zero;
            wr[i] = w[r + i];
            for (int k = 0; k < count; k++) {
                ur[k][i] = u[k * stride + r + i];
                qr[k][i] = q[k * stride + r + i];
            }
        }
        for (int j = 0; j < r; j++) {
            vec wj = w[j], pj = p[j], t[TILE];
            for (int i = 0; i < TILE; i++) t[i] = a[i][j];
            for (int k = 0; k < count; k++) {
                vec uj = u[k * stride + j], qj = q[k * stride + j];
                for (int i = 0; i < TILE; i++) {
                    t[i] -= ur[k][i] * qj;
                    t[i] -= qr[k][i] * uj;
                }
            }
            for (int i = 0; i < TILE; i++) {
                if (count) a[i][j] = t[i];
                s[i] += t[i] * wj;
                pj += t[i] * wr[i];
            }
            p[j] = pj;
        }
        for (int i = 0; i < TILE; i++)
            for (int j = 0; j <= i; j++) {
                vec t = a[i][r + j];
                for (int k = 0; k < count; k++) t -= ur[k][i] * qr[k][j] + qr[k][i] * ur[k][j];
                a[i][r + j] = corner[i][j] = corner[j][i] = t;
            }
        for (int i = 0; i < TILE; i++) {
            for (int j = 0; j < TILE; j++) s[i] += corner[i][j] * wr[j];
            p[r + i] = s[i];
        }
    }
    for (; r < m; r++)
        for (int j = 0; j <= r; j++) {
            vec t = g[row(r) + j];
            for (int k = 0; k < count; k++)
                t -= u[k * stride + r] * q[k * stride + j] + q[k * stride + r] * u[k * stride + j];
            g[row(r) + j] = t;
            p[r] += t * w[j];
            if (j < r) p[j] += t * w[r];
        }
}

/* Diagonal d[i * GROUPS] and squared off-diagonal e[i * GROUPS] of T; overwrites g. work [2 PENDING + 2, stride]. */
static void tridiagonal(vec *g, int n, int stride, vec *work, vec *d, vec *e) {
    vec *u = work, *q = u + PENDING * stride, *p = q + PENDING * stride, *w = p + stride, beta;
    int pending = 0;
    for (int i = n - 1;; i--) {
        vec *x = g + row(i);
        for (int k = 0; k < pending; k++) {
            const vec *uk = u + k * stride, *qk = q + k * stride;
            for (int j = 0; j <= i; j++) x[j] -= uk[i] * qk[j] + qk[i] * uk[j];
        }
        d[i * GROUPS] = x[i];
        if (!i) return;
        vec alpha = reflector(x, w, i, &beta);
        e[(i - 1) * GROUPS] = alpha * alpha;
        if (pending == PENDING) {
            pass(g, i, PENDING, stride, u, q, w, p);
            pending = 0;
        } else {
            pass(g, i, 0, stride, u, q, w, p);
            for (int k = 0; k < pending; k++) {
                const vec *uk = u + k * stride, *qk = q + k * stride;
                vec a = zero, b = zero;
                for (int j = 0; j < i; j++) {
                    a += qk[j] * w[j];
                    b += uk[j] * w[j];
                }
                for (int j = 0; j < i; j++) p[j] -= uk[j] * a + qk[j] * b;
            }
        }
        /* H G H = G - w q^T - q w^T with p = beta G w, q = p - (beta / 2) (p^T w) w. */
        vec dot = zero, *to = q + pending * stride;
        for (int j = 0; j < i; j++) {
            p[j] *= beta;
            dot += p[j] * w[j];
        }
        dot *= 0.5 * beta;
        for (int j = 0; j < i; j++) {
            to[j] = p[j] - dot * w[j];
            u[pending * stride + j] = w[j];
        }
        pending++;
    }
}

/* The shift of a sweep from l on, and whether a lane has not converged there. */
static int shift(const vec *d, vec *e, int n, int l, vec *sigma) {
    vec b = e[l * GROUPS], d0 = d[l * GROUPS], d1 = d[(l + 1) * GROUPS];
    mask open = b > EPS2;
    e[l * GROUPS] = pick(open, b, zero); /* where it is not zero the shifts for what follows make it grow again */
    if (l + 2 < n) { /* a lane that is done here works on its next eigenvalue */
        b = pick(open, b, e[(l + 1) * GROUPS]);
        d0 = pick(open, d0, d1);
        d1 = pick(open, d1, d[(l + 2) * GROUPS]);
    }
    mask coupled = b > 0;
    vec rte = root(pick(coupled, b, zero + 1.0)), t = (d1 - d0) / (2.0 * rte), r = root(t * t + 1.0);
    *sigma = pick(coupled, d0 - rte / (t + pick(t >= 0, r, -r)), d0);
    long long busy = 0;
    for (int i = 0; i < LANES; i++) busy |= open[i];
    return busy != 0;
}

/* Eigenvalues of GROUPS * LANES matrices T of trace 1 (or 0), left in d; NaN in lanes that do not converge. */
static void eigenvalues(vec *d, vec *e, int n) {
    for (int h = 0; h < GROUPS; h++) e[(n - 1) * GROUPS + h] = zero;
    for (int l = 0; l < n - 1; l++)
        for (int sweep = 0;; sweep++) {
            vec sigma[GROUPS], c[GROUPS], s[GROUPS], gamma[GROUPS], p[GROUPS];
            int busy = 0;
            for (int h = 0; h < GROUPS; h++) busy |= shift(d + h, e + h, n, l, sigma + h);
            if (!busy) break;
            if (sweep == MAX_SWEEPS) {
                for (int h = 0; h < GROUPS; h++)
                    d[l * GROUPS + h] = pick(e[l * GROUPS + h] > EPS2, zero / zero, d[l * GROUPS + h]);
                break;
            }
            for (int h = 0; h < GROUPS; h++) {
                c[h] = zero + 1.0;
                s[h] = zero;
                gamma[h] = d[(n - 1) * GROUPS + h] - sigma[h];
                p[h] = gamma[h] * gamma[h];
            }
            for (int i = n - 2; i >= l; i--)
                for (int h = 0; h < GROUPS; h++) {
                    /* 1 / r and 1 / p from one division. r = 0: nothing to rotate; p = 0 alone: a quarter turn. */
                    vec bb = e[i * GROUPS + h], r = p[h] + bb, rp = r * p[h], one = zero + 1.0;
                    mask both = rp > 1e-290, none = ~(r > 0);
                    vec inverse = one / pick(both, rp, one), over_r = p[h] * inverse;
                    vec old_c = c[h], old_gamma = gamma[h], alpha = d[i * GROUPS + h];
                    e[(i + 1) * GROUPS + h] = s[h] * r;
                    c[h] = pick(both, p[h] * over_r, pick(none, one, zero));
                    s[h] = pick(both, bb * over_r, pick(none, zero, one));
                    gamma[h] = c[h] * (alpha - sigma[h]) - s[h] * old_gamma;
                    d[(i + 1) * GROUPS + h] = old_gamma + (alpha - gamma[h]);
                    vec square = gamma[h] * gamma[h];
                    p[h] = pick(both, square * (r * r * inverse), pick(none, square, old_c * bb));
                }
            for (int h = 0; h < GROUPS; h++) {
                e[l * GROUPS + h] = s[h] * p[h];
                d[l * GROUPS + h] = sigma[h] + gamma[h];
            }
        }
}

/* out [batch, cols], in no order, of states [batch, rows, cols], doubles if `wide`, else floats. 1: out of memory. */
int singular_values(const void *states, int wide, double *out, long batch, int rows, int cols) {
    int padded = (cols + TILE - 1) / TILE * TILE, stride = padded + 3; /* apart by no power of two: cache sets */
    size_t counts[] = {(size_t)BLOCK * padded, row(cols), (size_t)(2 * PENDING + 2) * stride, (size_t)cols * GROUPS};
    vec *x = aligned_alloc(sizeof(vec), (counts[0] + counts[1] + counts[2] + 2 * counts[3]) * sizeof(vec));
    if (!x) return 1;
    vec *g = x + counts[0], *work = g + counts[1], *d = work + counts[2], *e = d + counts[3], trace[GROUPS];
    memset(x, 0, counts[0] * sizeof(vec));
    for (long first = 0; first < batch; first += LANES * GROUPS) {
        for (int h = 0; h < GROUPS; h++) {
            for (int r = 0; r < rows; r += BLOCK) {
                const char *from[LANES];
                for (int l = 0; l < LANES; l++) {
                    long at = first + h * LANES + l;
                    at = ((at < batch ? at : batch - 1) * rows + r) * cols; /* the last one fills empty lanes */
                    from[l] = (const char *)states + at * (wide ? sizeof(double) : sizeof(float));
                }
                int count = rows - r < BLOCK ? rows - r : BLOCK;
                lay_out(from, wide, x, count, cols);
                gram(x, g, count, cols, r > 0);
            }
            tridiagonal(g, cols, stride, work, d + h, e + h);
            trace[h] = zero;
            for (int i = 0; i < cols; i++) trace[h] += d[i * GROUPS + h];
            vec scale = pick(trace[h] > 0, 1.0 / trace[h], zero + 1.0);
            for (int i = 0; i < cols; i++) {
                d[i * GROUPS + h] *= scale;
                e[i * GROUPS + h] *= scale * scale; /* of the last, nothing is read */
            }
        }
        eigenvalues(d, e, cols);
        for (int h = 0; h < GROUPS; h++)
            for (int l = 0; l < LANES; l++) {
                long at = first + h * LANES + l;
                for (int i = 0; at < batch && i < cols; i++) out[at * cols + i] = d[i * GROUPS + h][l] * trace[h][l];
            }
    }
    free(x);
    return 0;
}
