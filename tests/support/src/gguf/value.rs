//! Metadata values and their encoding.

/// A metadata value of any kind that GGUF has.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the variants are GGUF's own names")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// An array of one kind of value. GGUF knows arrays of arrays too, llama.cpp does not read them: they are left out.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the variants are GGUF's own names")]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
}

const ARRAY: u32 = 9;

impl Value {
    /// Appends the type's number and the value (GGUF specification, `gguf_metadata_value_t`).
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(v) => scalar(v, out),
            Self::I8(v) => scalar(v, out),
            Self::U16(v) => scalar(v, out),
            Self::I16(v) => scalar(v, out),
            Self::U32(v) => scalar(v, out),
            Self::I32(v) => scalar(v, out),
            Self::U64(v) => scalar(v, out),
            Self::I64(v) => scalar(v, out),
            Self::F32(v) => scalar(v, out),
            Self::F64(v) => scalar(v, out),
            Self::Bool(v) => scalar(v, out),
            Self::String(v) => scalar(v, out),
            Self::Array(v) => {
                out.extend(ARRAY.to_le_bytes());
                v.encode(out);
            }
        }
    }
}

impl Array {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(v) => items(v, out),
            Self::I8(v) => items(v, out),
            Self::U16(v) => items(v, out),
            Self::I16(v) => items(v, out),
            Self::U32(v) => items(v, out),
            Self::I32(v) => items(v, out),
            Self::U64(v) => items(v, out),
            Self::I64(v) => items(v, out),
            Self::F32(v) => items(v, out),
            Self::F64(v) => items(v, out),
            Self::Bool(v) => items(v, out),
            Self::String(v) => items(v, out),
        }
    }
}

fn scalar<T: Item>(v: &T, out: &mut Vec<u8>) {
    out.extend(T::NUMBER.to_le_bytes());
    v.put(out);
}

fn items<T: Item>(items: &[T], out: &mut Vec<u8>) {
    out.extend(T::NUMBER.to_le_bytes());
    out.extend((items.len() as u64).to_le_bytes());
    for item in items {
        item.put(out);
    }
}

/// What a scalar and an array's element have in common.
trait Item {
    /// The type's number in `gguf_metadata_value_type`.
    const NUMBER: u32;
    fn put(&self, out: &mut Vec<u8>);
}

macro_rules! numbers {
    ($($type:ty, $variant:ident, $number:literal;)*) => {$(
        impl Item for $type {
            const NUMBER: u32 = $number;
            fn put(&self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }
        }
        conversions!($type, $variant);
    )*};
}

macro_rules! conversions {
    ($type:ty, $variant:ident) => {
        impl From<$type> for Value {
            fn from(v: $type) -> Self {
                Self::$variant(v)
            }
        }
        impl From<Vec<$type>> for Value {
            fn from(v: Vec<$type>) -> Self {
                Self::Array(Array::$variant(v))
            }
        }
    };
}

numbers! {
    u8, U8, 0;
    i8, I8, 1;
    u16, U16, 2;
    i16, I16, 3;
    u32, U32, 4;
    i32, I32, 5;
    f32, F32, 6;
    u64, U64, 10;
    i64, I64, 11;
    f64, F64, 12;
}

impl Item for bool {
    const NUMBER: u32 = 7;
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
}
conversions!(bool, Bool);

impl Item for String {
    const NUMBER: u32 = 8;
    fn put(&self, out: &mut Vec<u8>) {
        put_str(self, out);
    }
}
conversions!(String, String);

impl From<&str> for Value {
    fn from(v: &str) -> Self {
        Self::String(v.to_owned())
    }
}

/// Appends a string as GGUF writes it: its length in bytes, then the bytes.
pub(crate) fn put_str(s: &str, out: &mut Vec<u8>) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}
