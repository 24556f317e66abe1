//! The subset of the pickle format that PyTorch uses for tensors. Nothing is imported or called: a
//! function with its arguments is represented as a value.
//!
//! Values are in one list and refer to each other by index. So shared, deeply nested and cyclic
//! values need memory proportional to the bytes read, and are dropped without recursion.

use std::collections::HashMap;

/// The index of a value.
pub type Id = u32;

/// A value. Its parts are indices of other values.
#[derive(Debug, PartialEq)]
pub enum Value {
    /// `None`, and values that tensors do not need.
    Other,
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A class or function: module and name.
    Global(Box<(String, String)>),
    /// A function call, which is not executed, or an instance of a class.
    Call {
        function: Id,
        arguments: Id,
    },
    /// An object outside the pickle, by its description.
    Persistent(Id),
}

impl Value {
    /// Returns the kind of value, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Other => "a plain value",
            Self::Int(_) => "an integer",
            Self::Text(_) => "a string",
            Self::Tuple(_) => "a tuple",
            Self::List(_) => "a list",
            Self::Dict(_) => "a dictionary",
            Self::Global(_) => "a class or function",
            Self::Call { .. } => "an object",
            Self::Persistent(_) => "a storage",
        }
    }
}

/// A parsed pickle.
#[derive(Debug)]
pub struct Pickle {
    values: Vec<Value>,
    root: Id,
}

impl Pickle {
    /// Reads the pickle at the start of `bytes`.
    ///
    /// # Errors
    /// A message with the reason and the position.
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut machine = Machine { rest: bytes, ..Machine::default() };
        loop {
            let at = bytes.len() - machine.rest.len();
            match machine.step() {
                Ok(None) => {}
                Ok(Some(root)) => return Ok(Self { values: machine.values, root }),
                Err(reason) => return Err(format!("byte {at} of the pickle: {reason}")),
            }
        }
    }

    /// Returns the value of the pickle.
    pub fn root(&self) -> &Value {
        self.get(self.root)
    }

    /// Returns a value by its index.
    pub fn get(&self, id: Id) -> &Value {
        &self.values[id as usize]
    }
}

/// The interpreter of a pickle.
#[derive(Default)]
struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value>,
    stack: Vec<Id>,
    /// The height of the stack at each open mark.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    /// Executes one operation. Returns the result at the end of the program.
    fn step(&mut self) -> Result<Option<Id>, String> {
        match self.byte()? {
            // Protocol and frame.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'.' => return self.pop().map(Some),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'N' | 0x88 | 0x89 => self.push(Value::Other),
            b'G' => {
                self.take(8)?;
                self.push(Value::Other);
            }
            b'J' => self.signed(4)?,
            b'K' => self.unsigned(1)?,
            b'M' => self.unsigned(2)?,
            0x8a => {
                let len = usize::from(self.byte()?);
                self.signed(len)?;
            }
            b'U' | 0x8c => self.text(1)?,
            b'T' | b'X' => self.text(4)?,
            0x8d => self.text(8)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Value::Global(Box::new((module, name))));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let global = (self.text_of(module)?, self.text_of(name)?);
                self.push(Value::Global(Box::new(global)));
            }
            b')' => self.push(Value::Tuple(Vec::new())),
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b't' => {
                let parts = self.pop_to_mark()?;
                self.push(Value::Tuple(parts));
            }
            b']' => self.push(Value::List(Vec::new())),
            b'l' => {
                let parts = self.pop_to_mark()?;
                self.push(Value::List(parts));
            }
            b'a' => {
                let part = self.pop()?;
                self.extend(vec![part])?;
            }
            b'e' => {
                let parts = self.pop_to_mark()?;
                self.extend(parts)?;
            }
            b'}' => self.push(Value::Dict(Vec::new())),
            b'd' => {
                let parts = self.pop_to_mark()?;
                self.push(Value::Dict(pairs(&parts)?));
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.insert(&[key, value])?;
            }
            b'u' => {
                let parts = self.pop_to_mark()?;
                self.insert(&parts)?;
            }
            b'q' => {
                let key = u32::from(self.byte()?);
                self.remember(key)?;
            }
            b'r' => {
                let key = self.number(4)? as u32;
                self.remember(key)?;
            }
            0x94 => self.remember(self.memo.len() as u32)?,
            b'h' => {
                let key = u32::from(self.byte()?);
                self.recall(key)?;
            }
            b'j' => {
                let key = self.number(4)? as u32;
                self.recall(key)?;
            }
            b'Q' => {
                let description = self.pop()?;
                self.push(Value::Persistent(description));
            }
            b'R' | 0x81 => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                let value = self.call(function, arguments);
                self.push(value);
            }
            // Attributes of an object, which tensors do not need.
            b'b' => drop(self.pop()?),
            other => {
                return Err(format!("operation {other:#04x}, which no tensors are written with"));
            }
        }
        Ok(None)
    }

    /// Returns the value of a call: an empty dictionary for an ordered dictionary, otherwise the
    /// call itself.
    fn call(&self, function: Id, arguments: Id) -> Value {
        let is_ordered = matches!(&self.values[function as usize], Value::Global(global)
            if (global.0.as_str(), global.1.as_str()) == ("collections", "OrderedDict"));
        let is_empty = self.values[arguments as usize] == Value::Tuple(Vec::new());
        match is_ordered && is_empty {
            true => Value::Dict(Vec::new()),
            false => Value::Call { function, arguments },
        }
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len() as Id);
        self.values.push(value);
    }

    fn pop(&mut self) -> Result<Id, String> {
        // Values below a mark cannot be popped before the mark.
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > floor {
            true => self.stack.pop().ok_or_else(missing),
            false => Err(missing()),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&mut self) -> Result<&mut Value, String> {
        let id = self.stack.last().copied().ok_or_else(missing)?;
        Ok(&mut self.values[id as usize])
    }

    fn tuple(&mut self, len: usize) -> Result<(), String> {
        let mut parts = (0..len).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        parts.reverse();
        self.push(Value::Tuple(parts));
        Ok(())
    }

    fn extend(&mut self, parts: Vec<Id>) -> Result<(), String> {
        match self.top()? {
            Value::List(list) => list.extend(parts),
            other => return Err(format!("expected a list to add to, got {}", other.kind())),
        }
        Ok(())
    }

    fn insert(&mut self, parts: &[Id]) -> Result<(), String> {
        let parts = pairs(parts)?;
        match self.top()? {
            Value::Dict(dict) => dict.extend(parts),
            other => return Err(format!("expected a dictionary to add to, got {}", other.kind())),
        }
        Ok(())
    }

    fn remember(&mut self, key: u32) -> Result<(), String> {
        let id = self.stack.last().copied().ok_or_else(missing)?;
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<(), String> {
        let id = self.memo.get(&key).ok_or_else(|| format!("nothing is memoised as {key}"))?;
        self.stack.push(*id);
        Ok(())
    }

    fn take(&mut self, len: usize) -> Result<&[u8], String> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or("the file ends here")?;
        self.rest = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    /// Reads a little-endian number of up to 8 bytes.
    fn number(&mut self, len: usize) -> Result<u64, String> {
        Ok(self.take(len)?.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn unsigned(&mut self, len: usize) -> Result<(), String> {
        let number = self.number(len)? as i64;
        self.push(Value::Int(number));
        Ok(())
    }

    fn signed(&mut self, len: usize) -> Result<(), String> {
        if len > 8 {
            return Err(format!("an integer of {len} bytes; at most 8 are read"));
        }
        let unused = 64 - 8 * len as u32;
        let number = self.number(len)?.checked_shl(unused).unwrap_or(0) as i64;
        self.push(Value::Int(number.checked_shr(unused).unwrap_or(0)));
        Ok(())
    }

    /// Reads a string that follows its length in `len` bytes.
    fn text(&mut self, len: usize) -> Result<(), String> {
        let len = usize::try_from(self.number(len)?).map_err(|e| e.to_string())?;
        let text = String::from_utf8_lossy(self.take(len)?).into_owned();
        self.push(Value::Text(text));
        Ok(())
    }

    fn text_of(&self, id: Id) -> Result<String, String> {
        match &self.values[id as usize] {
            Value::Text(text) => Ok(text.clone()),
            other => Err(format!("expected a name, got {}", other.kind())),
        }
    }

    fn line(&mut self) -> Result<String, String> {
        let end = self.rest.iter().position(|&byte| byte == b'\n').ok_or("the file ends here")?;
        let line = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.take(1)?;
        Ok(line)
    }
}

fn missing() -> String {
    "a value is missing".into()
}

fn pairs(parts: &[Id]) -> Result<Vec<(Id, Id)>, String> {
    let (pairs, rest) = parts.as_chunks::<2>();
    match rest {
        [] => Ok(pairs.iter().map(|&[key, value]| (key, value)).collect()),
        _ => Err("a key without a value".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(bytes: &[u8]) -> String {
        Pickle::read(bytes).unwrap_err()
    }

    #[test]
    fn integers_are_read_as_python_writes_them() {
        for (bytes, want) in [
            (&b"K\xff."[..], 255),
            (b"M\x00\x80.", 32_768),
            (b"J\xfe\xff\xff\xff.", -2),
            (b"\x8a\x00.", 0),
            (b"\x8a\x01\xff.", -1),
            (b"\x8a\x03\x00\x00\x80.", -(1 << 23)),
            (b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f.", i64::MAX),
        ] {
            assert_eq!(*Pickle::read(bytes).unwrap().root(), Value::Int(want), "{bytes:?}");
        }
    }

    #[test]
    fn broken_pickles_are_named_by_their_byte() {
        assert!(error(b"").contains("byte 0"));
        assert!(error(b"K\x01").contains("byte 2"));
        assert!(error(b"\x85.").contains("a value is missing"));
        assert!(error(b"K\x01(\x85.").contains("a value is missing"));
        assert!(error(b"t.").contains("a mark is missing"));
        assert!(error(b"K\x01K\x02a.").contains("a list to add to, got an integer"));
        assert!(error(b"}(K\x01u.").contains("a key without a value"));
        assert!(error(b"h\x05.").contains("memoised as 5"));
        assert!(error(b"X\xff\xff\xff\xffabc.").contains("the file ends here"));
        assert!(error(b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.").contains("the file ends here"));
        assert!(error(b"\x8a\x09123456789.").contains("9 bytes"));
        assert!(error(b"\xfe").contains("operation 0xfe"));
        assert!(error(b"cposix").contains("the file ends here"));
    }

    #[test]
    fn deep_and_shared_values_need_memory_proportional_to_the_file() {
        // Nested tuples, a million levels deep.
        let deep = [b")".as_slice(), &[0x85; 1_000_000], b"."].concat();
        assert_eq!(Pickle::read(&deep).unwrap().values.len(), 1_000_001);
        // Each list contains the previous one twice: 2^60 elements if they were copied.
        let mut doubled = b"]q\x00".to_vec();
        for i in 0..60u8 {
            doubled.extend([b"](h", &[i][..], b"h", &[i], b"eq", &[i + 1]].concat());
        }
        doubled.push(b'.');
        assert_eq!(Pickle::read(&doubled).unwrap().values.len(), 61);
        // A list that contains itself.
        assert!(Pickle::read(b"]q\x00h\x00a.").is_ok());
    }
}
