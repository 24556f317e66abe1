//! Reads Python pickles as data: the descriptions of tensors in PyTorch checkpoints. No function is
//! ever called.
//!
//! Objects are stored in an arena and refer to each other by index. So no object is copied when the
//! memo returns it again, there is no recursion, and memory is bounded by the number of bytes read.

use std::collections::HashMap;

/// The index of an object.
pub(crate) type Id = usize;

/// An object of a pickle, as far as checkpoints need it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Object {
    Int(i64),
    Text(String),
    /// The name of a class or function, "torch._utils._rebuild_tensor_v2".
    Global(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A reference to something outside of the pickle: the storage of a tensor.
    Persistent(Id),
    /// A function call, which is not executed.
    Call {
        function: Id,
        arguments: Id,
    },
    /// None, a boolean, a float, or bytes.
    Other,
}

/// An unpickled object and everything that it refers to.
#[derive(Debug)]
pub(crate) struct Pickle {
    objects: Vec<Object>,
    root: Id,
}

impl Pickle {
    /// # Errors
    /// The position and the reason, if the bytes are not a pickle or use operations that
    /// checkpoints do not need.
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut machine = Machine { bytes, at: 0, ..Machine::default() };
        loop {
            let at = machine.at;
            match machine.step() {
                Ok(None) => {}
                Ok(Some(root)) => return Ok(Self { objects: machine.objects, root }),
                Err(reason) => return Err(format!("pickle, byte {at}: {reason}")),
            }
        }
    }

    pub fn root(&self) -> Id {
        self.root
    }

    pub fn get(&self, id: Id) -> &Object {
        &self.objects[id]
    }

    pub fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Object::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Object::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// Returns a non-negative integer.
    pub fn number(&self, id: Id) -> Option<usize> {
        match self.get(id) {
            Object::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        }
    }

    pub fn global(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Object::Global(name) => Some(name),
            _ => None,
        }
    }

    /// Returns the function's name and the arguments of a call.
    pub fn call(&self, id: Id) -> Option<(&str, &[Id])> {
        match self.get(id) {
            Object::Call { function, arguments } => {
                Some((self.global(*function)?, self.tuple(*arguments)?))
            }
            _ => None,
        }
    }
}

#[derive(Default)]
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    objects: Vec<Object>,
    stack: Vec<Id>,
    /// Stack heights at the marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    memoized: u32,
}

impl Machine<'_> {
    /// Executes one operation; returns the remaining object at the end.
    fn step(&mut self) -> Result<Option<Id>, String> {
        match self.byte()? {
            b'.' => return self.pop().map(Some),
            // Protocol and frames have no meaning for a reader that has all bytes.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'N' | 0x88 | 0x89 => self.push(Object::Other),
            b'K' => self.int::<1>()?,
            b'M' => self.int::<2>()?,
            b'J' => {
                let n = i32::from_le_bytes(self.array()?);
                self.push(Object::Int(n.into()));
            }
            0x8a => self.long()?,
            b'G' => {
                self.take(8)?;
                self.push(Object::Other);
            }
            0x8c => self.text_of::<1>()?,
            b'X' => self.text_of::<4>()?,
            0x8d => self.text_of::<8>()?,
            b'U' => self.text_of::<1>()?,
            b'T' => self.text_of::<4>()?,
            b'C' => self.bytes_of::<1>()?,
            b'B' => self.bytes_of::<4>()?,
            0x8e | 0x96 => self.bytes_of::<8>()?,
            b'c' => {
                let name = format!("{}.{}", self.line()?, self.line()?);
                self.push(Object::Global(name));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (&self.objects[module], &self.objects[name]) {
                    (Object::Text(module), Object::Text(name)) => {
                        self.push(Object::Global(format!("{module}.{name}")));
                    }
                    _ => return Err("a global without a name".into()),
                }
            }
            b')' => self.push(Object::Tuple(Vec::new())),
            b']' => self.push(Object::List(Vec::new())),
            b'}' => self.push(Object::Dict(Vec::new())),
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Object::Tuple(items));
            }
            b'l' => {
                let items = self.pop_to_mark()?;
                self.push(Object::List(items));
            }
            b'd' => {
                let items = self.pop_to_mark()?;
                self.push(Object::Dict(Vec::new()));
                self.set_items(items)?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(vec![key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(items)?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Object::Persistent(id));
            }
            b'R' | 0x81 => self.call()?,
            // The state of an object, for example the metadata of an ordered dictionary.
            b'b' => drop(self.pop()?),
            b'q' => {
                let key = u32::from(self.byte()?);
                self.memoize(key)?;
            }
            b'r' => {
                let key = u32::from_le_bytes(self.array()?);
                self.memoize(key)?;
            }
            0x94 => self.memoize(self.memoized)?,
            b'h' => {
                let key = u32::from(self.byte()?);
                self.recall(key)?;
            }
            b'j' => {
                let key = u32::from_le_bytes(self.array()?);
                self.recall(key)?;
            }
            other => return Err(format!("operation {other:#04x}, which no checkpoint needs")),
        }
        Ok(None)
    }

    fn push(&mut self, object: Object) {
        self.stack.push(self.objects.len());
        self.objects.push(object);
    }

    fn pop(&mut self) -> Result<Id, String> {
        let bottom = self.marks.last().copied().unwrap_or(0);
        let full = self.stack.len() > bottom;
        full.then(|| self.stack.pop()).flatten().ok_or_else(|| "the stack is empty".into())
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("there is no mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn tuple(&mut self, count: usize) -> Result<(), String> {
        let mut items = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        self.push(Object::Tuple(items));
        Ok(())
    }

    fn top(&mut self) -> Result<&mut Object, String> {
        let id = self.stack.last().ok_or("the stack is empty")?;
        Ok(&mut self.objects[*id])
    }

    fn append(&mut self, items: Vec<Id>) -> Result<(), String> {
        match self.top()? {
            Object::List(list) => list.extend(items),
            _ => return Err("appends to something that is no list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, items: Vec<Id>) -> Result<(), String> {
        if !items.len().is_multiple_of(2) {
            return Err("a key without a value".into());
        }
        match self.top()? {
            Object::Dict(dict) => dict.extend(items.chunks_exact(2).map(|kv| (kv[0], kv[1]))),
            _ => return Err("sets an item of something that is no dictionary".into()),
        }
        Ok(())
    }

    fn call(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        match &self.objects[function] {
            Object::Global(name) if name == "collections.OrderedDict" => {
                self.push(Object::Dict(Vec::new()));
            }
            _ => self.push(Object::Call { function, arguments }),
        }
        Ok(())
    }

    fn memoize(&mut self, key: u32) -> Result<(), String> {
        let id = *self.stack.last().ok_or("the stack is empty")?;
        self.memo.insert(key, id);
        self.memoized += 1;
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<(), String> {
        let id = self.memo.get(&key).ok_or_else(|| format!("the memo has no entry {key}"))?;
        self.stack.push(*id);
        Ok(())
    }

    fn int<const N: usize>(&mut self) -> Result<(), String> {
        let n = self.length::<N>()?;
        self.push(Object::Int(n as i64));
        Ok(())
    }

    fn long(&mut self) -> Result<(), String> {
        let count = self.byte()?.into();
        let bytes = self.take(count)?;
        if bytes.len() > 8 {
            return Err("a number of more than 64 bits".into());
        }
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut all = [if negative { 0xff } else { 0 }; 8];
        all[..bytes.len()].copy_from_slice(bytes);
        self.push(Object::Int(i64::from_le_bytes(all)));
        Ok(())
    }

    fn text_of<const N: usize>(&mut self) -> Result<(), String> {
        let length = self.length::<N>()?;
        let text = String::from_utf8(self.take(length)?.to_vec());
        self.push(Object::Text(text.map_err(|e| e.to_string())?));
        Ok(())
    }

    fn bytes_of<const N: usize>(&mut self) -> Result<(), String> {
        let length = self.length::<N>()?;
        self.take(length)?;
        self.push(Object::Other);
        Ok(())
    }

    fn line(&mut self) -> Result<String, String> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|&b| b == b'\n').ok_or("a line without an end")?;
        let line = self.take(end + 1)?;
        String::from_utf8(line[..end].to_vec()).map_err(|e| e.to_string())
    }

    fn length<const N: usize>(&mut self) -> Result<usize, String> {
        let mut all = [0; 8];
        all[..N].copy_from_slice(self.take(N)?);
        usize::try_from(u64::from_le_bytes(all)).map_err(|e| e.to_string())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut all = [0; N];
        all.copy_from_slice(self.take(N)?);
        Ok(all)
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn take(&mut self, count: usize) -> Result<&[u8], String> {
        let bytes = self.bytes.get(self.at..).and_then(|rest| rest.get(..count));
        let bytes = bytes.ok_or_else(|| format!("truncated: {count} more bytes expected"))?;
        self.at += count;
        Ok(bytes)
    }
}
