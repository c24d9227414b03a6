//! llama.cpp's log, sent to `tracing`. What it says of a step that was stopped on purpose is no error.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_void};

use llama_cpp_sys_2 as sys;

thread_local! {
    /// Whether this thread's step was told to stop.
    static STOPPED: Cell<bool> = const { Cell::new(false) };
}

/// From now on, llama.cpp's messages go to `tracing`.
#[expect(unsafe_code, reason = "a call into llama.cpp")]
pub(super) fn send_to_tracing() {
    // SAFETY: the function lives as long as the program, and takes no data.
    unsafe {
        sys::llama_log_set(Some(message), std::ptr::null_mut());
        // The library for images and audio has a log of its own.
        sys::mtmd_helper_log_set(Some(message), std::ptr::null_mut());
    }
}

/// Says whether what llama.cpp now reports on this thread is a step that was told to stop.
pub(super) fn step_is_stopped(stopped: bool) {
    STOPPED.set(stopped);
}

#[expect(unsafe_code, reason = "called by llama.cpp")]
unsafe extern "C" fn message(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp gives a text that ends with a NUL and lives through the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let text = text.trim_end();
    match level {
        // Dots of progress, mostly.
        sys::GGML_LOG_LEVEL_CONT => {}
        _ if text.is_empty() => {}
        sys::GGML_LOG_LEVEL_ERROR if !STOPPED.get() => tracing::error!(target: "llama.cpp", "{text}"),
        sys::GGML_LOG_LEVEL_WARN if !STOPPED.get() => tracing::warn!(target: "llama.cpp", "{text}"),
        sys::GGML_LOG_LEVEL_ERROR | sys::GGML_LOG_LEVEL_WARN | sys::GGML_LOG_LEVEL_INFO => {
            tracing::debug!(target: "llama.cpp", "{text}");
        }
        _ => tracing::trace!(target: "llama.cpp", "{text}"),
    }
}
