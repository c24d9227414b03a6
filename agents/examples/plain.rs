#![allow(unsafe_code, clippy::all, missing_docs, clippy::pedantic)]
use llama_cpp_sys_2 as s;
use std::ffi::CString;
use std::time::Instant;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let path = CString::new(a[1].as_str()).unwrap();
    let repack = a[2] == "repack";
    let n_ctx: u32 = a[3].parse().unwrap();
    let runs: usize = a[4].parse().unwrap();
    unsafe {
        s::llama_backend_init();
        let mut p = s::llama_model_default_params();
        p.use_extra_bufts = repack;
        p.load_mode = if repack { s::LLAMA_LOAD_MODE_NONE } else { s::LLAMA_LOAD_MODE_MMAP };
        let m = s::llama_load_model_from_file(path.as_ptr(), p);
        let mut c = s::llama_context_default_params();
        c.n_ctx = n_ctx; c.n_batch = 512; c.n_ubatch = 512; c.n_threads = 2; c.n_threads_batch = 2; c.no_perf = true;
        if a.len() > 5 && a[5] == "unified" { c.kv_unified = true; c.swa_full = true; c.n_seq_max = 4; }
        let x = s::llama_init_from_model(m, c);
        for run in 0..runs + 1 {
            s::llama_memory_clear(s::llama_get_memory(x), true);
            let mut toks: Vec<i32> = (0..512).map(|i| 1000 + (i * 7 + run as i32) % 20000).collect();
            let t = Instant::now();
            let b = s::llama_batch_get_one(toks.as_mut_ptr(), 512);
            s::llama_decode(x, b); s::llama_synchronize(x);
            let pp = 512.0 / t.elapsed().as_secs_f64();
            s::llama_memory_clear(s::llama_get_memory(x), true);
            let t = Instant::now();
            for i in 0..64 { let mut tok = 1000 + i; let b = s::llama_batch_get_one(&mut tok, 1); s::llama_decode(x, b); s::llama_synchronize(x); }
            let tg = 64.0 / t.elapsed().as_secs_f64();
            if run > 0 { println!("{} pp {pp:.1} tg {tg:.2}", a[2]); }
        }
    }
}
