// Times oneDNN's matmul at the shapes of SmolLM2-135M: what `inkling bench ops` is compared with on a processor.
//
//     gcc -O2 -fopenmp onednn.c -o onednn -ldnnl -lm
//     OMP_NUM_THREADS=2 ./onednn f32|bf16 [seconds for each case, default 0.4]
//
// x (rows, k) times w (n, k) transposed gives f32 (rows, n). Weights lie as oneDNN likes them best; packing them is not
// timed. Weights and x are of the named type; bf16 is only fast where the processor multiplies it (avx512_bf16 or
// amx_bf16 in /proc/cpuinfo), and refused by oneDNN where it can't. Medians of at least 5 runs after one that does not
// count; `spread` is (p90 - p10) / median. On standard output one JSON object.
//
// Needs: oneDNN 2.x (Debian: libdnnl-dev) built with OpenMP.

#include <math.h>
#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LEAST_RUNS = 5, MOST_RUNS = 30 };

struct shape {
    const char *name;
    dnnl_dim_t n, k;
};

static const struct shape SHAPES[] = {
    {"qkv", 960, 576}, {"out", 576, 576}, {"gate_up", 3072, 576}, {"down", 576, 1536}, {"head", 49152, 576},
};
static const dnnl_dim_t ROWS[] = {8, 32, 64, 128, 512};

static dnnl_engine_t engine;
static dnnl_stream_t stream;

static void check(dnnl_status_t status, const char *what) {
    if (status == dnnl_success) return;
    fprintf(stderr, "onednn: %s failed with status %d%s\n", what, (int)status,
            status == dnnl_unimplemented ? " (not implemented on this processor)" : "");
    exit(1);
}

static dnnl_memory_desc_t matrix(dnnl_dim_t rows, dnnl_dim_t columns, dnnl_data_type_t type, dnnl_format_tag_t tag) {
    dnnl_memory_desc_t desc;
    const dnnl_dims_t dims = {rows, columns};
    check(dnnl_memory_desc_init_by_tag(&desc, 2, dims, type, tag), "a matrix");
    return desc;
}

static dnnl_memory_t allocate(const dnnl_memory_desc_t *desc) {
    dnnl_memory_t memory;
    check(dnnl_memory_create(&memory, desc, engine, DNNL_MEMORY_ALLOCATE), "memory");
    return memory;
}

static void run(dnnl_primitive_t primitive, int count, const dnnl_exec_arg_t *operands) {
    check(dnnl_primitive_execute(primitive, stream, count, operands), "running");
    check(dnnl_stream_wait(stream), "waiting");
}

static void reorder(dnnl_memory_t from, dnnl_memory_t to) {
    const dnnl_memory_desc_t *from_desc, *to_desc;
    check(dnnl_memory_get_memory_desc(from, &from_desc), "a description");
    check(dnnl_memory_get_memory_desc(to, &to_desc), "a description");
    dnnl_primitive_desc_t desc;
    check(dnnl_reorder_primitive_desc_create(&desc, from_desc, engine, to_desc, engine, NULL), "a reorder");
    dnnl_primitive_t primitive;
    check(dnnl_primitive_create(&primitive, desc), "a reorder");
    const dnnl_exec_arg_t operands[] = {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}};
    run(primitive, 2, operands);
    check(dnnl_primitive_destroy(primitive), "clearing up");
    check(dnnl_primitive_desc_destroy(desc), "clearing up");
}

// A matrix in the wanted form, with numbers in -0.5..0.5.
static dnnl_memory_t filled(const dnnl_memory_desc_t *wanted) {
    const dnnl_memory_desc_t plain = matrix(wanted->dims[0], wanted->dims[1], dnnl_f32, dnnl_ab);
    dnnl_memory_t source = allocate(&plain), target = allocate(wanted);
    void *numbers;
    check(dnnl_memory_get_data_handle(source, &numbers), "memory");
    unsigned state = 1;
    for (dnnl_dim_t i = 0; i < wanted->dims[0] * wanted->dims[1]; i++) {
        state = state * 1664525u + 1013904223u;
        ((float *)numbers)[i] = (float)(state >> 8) / (float)(1 << 24) - 0.5f;
    }
    reorder(source, target);
    check(dnnl_memory_destroy(source), "clearing up");
    return target;
}

static int compare(const void *left, const void *right) {
    const double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static void time_product(const struct shape *shape, dnnl_dim_t rows, dnnl_data_type_t type, double seconds) {
    const dnnl_memory_desc_t x_desc = matrix(rows, shape->k, type, dnnl_ab);
    const dnnl_memory_desc_t any = matrix(shape->k, shape->n, type, dnnl_format_tag_any);
    const dnnl_memory_desc_t out_desc = matrix(rows, shape->n, dnnl_f32, dnnl_ab);
    dnnl_matmul_desc_t product;
    check(dnnl_matmul_desc_init(&product, &x_desc, &any, NULL, &out_desc), "a matmul");
    dnnl_primitive_desc_t desc;
    check(dnnl_primitive_desc_create(&desc, &product, NULL, engine, NULL), "a matmul");
    dnnl_primitive_t primitive;
    check(dnnl_primitive_create(&primitive, desc), "a matmul");
    const char *kind;
    check(dnnl_primitive_desc_query(desc, dnnl_query_impl_info_str, 0, &kind), "a query");

    dnnl_memory_t x = filled(&x_desc), out = allocate(&out_desc);
    dnnl_memory_t weights = filled(dnnl_primitive_desc_query_md(desc, dnnl_query_weights_md, 0));
    const dnnl_exec_arg_t operands[] = {{DNNL_ARG_SRC, x}, {DNNL_ARG_WEIGHTS, weights}, {DNNL_ARG_DST, out}};
    run(primitive, 3, operands);
    double times[MOST_RUNS];
    int runs = 0;
    for (const double start = omp_get_wtime();
         runs < LEAST_RUNS || (runs < MOST_RUNS && omp_get_wtime() - start < seconds); runs++) {
        const double begin = omp_get_wtime();
        run(primitive, 3, operands);
        times[runs] = omp_get_wtime() - begin;
    }
    qsort(times, (size_t)runs, sizeof *times, compare);
    const double median = times[lround((runs - 1) * 0.5)];
    const double spread = (times[lround((runs - 1) * 0.9)] - times[lround((runs - 1) * 0.1)]) / median;
    const double flops = 2.0 * (double)rows * (double)shape->n * (double)shape->k;
    printf("{\"shape\": \"%s\", \"rows\": %d, \"n\": %d, \"k\": %d, \"seconds\": %.9g, \"spread\": %.4f, \"flops\": "
           "%.0f, \"gflops_per_s\": %.2f, \"kernel\": \"%s\"}",
           shape->name, (int)rows, (int)shape->n, (int)shape->k, median, spread, flops, flops / median / 1e9, kind);

    check(dnnl_memory_destroy(x), "clearing up");
    check(dnnl_memory_destroy(weights), "clearing up");
    check(dnnl_memory_destroy(out), "clearing up");
    check(dnnl_primitive_destroy(primitive), "clearing up");
    check(dnnl_primitive_desc_destroy(desc), "clearing up");
}

int main(int argc, char **argv) {
    const int is_bf16 = argc > 1 && strcmp(argv[1], "bf16") == 0;
    if (argc < 2 || argc > 3 || (!is_bf16 && strcmp(argv[1], "f32") != 0)) {
        fprintf(stderr, "usage: onednn f32|bf16 [seconds]\n");
        return 2;
    }
    const double seconds = argc > 2 ? atof(argv[2]) : 0.4;
    check(dnnl_engine_create(&engine, dnnl_cpu, 0), "an engine");
    check(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags), "a stream");
    const dnnl_version_t *version = dnnl_version();
    printf("{\"onednn\": \"%d.%d.%d\", \"dtype\": \"%s\", \"threads\": %d, \"results\": [", version->major,
           version->minor, version->patch, argv[1], omp_get_max_threads());
    const char *separator = "";
    for (size_t s = 0; s < sizeof SHAPES / sizeof *SHAPES; s++) {
        for (size_t r = 0; r < sizeof ROWS / sizeof *ROWS; r++) {
            printf("%s\n", separator);
            time_product(&SHAPES[s], ROWS[r], is_bf16 ? dnnl_bf16 : dnnl_f32, seconds);
            separator = ",";
        }
    }
    printf("\n]}\n");
    check(dnnl_stream_destroy(stream), "clearing up");
    check(dnnl_engine_destroy(engine), "clearing up");
    return 0;
}
