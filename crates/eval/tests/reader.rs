//! The text that a model is fed for a sample: truncated, compressed, with its template.

use std::cell::RefCell;
use std::rc::Rc;

use candle_core::{Device, Tensor};
use longctx_core::{
    Batch, CausalLm, Compressed, Error, Footprint, Logits, Prompt, PromptCompressor, Rate, Result,
    SeqId,
};
use longctx_eval::{Fault, Question, Reader, Sample, Subject, Task, Text, longbench};

const VOCAB: usize = 128;

/// A model that records the tokens fed to it and answers with the letter after the last one. It
/// supports one sequence.
#[derive(Default)]
struct Notes {
    fed: Rc<RefCell<String>>,
    seen: usize,
}

impl CausalLm for Notes {
    fn forward(&mut self, batch: &Batch, ids: &[u32], _: Logits) -> Result<Tensor> {
        assert_eq!(batch.seqs(), [0]);
        self.seen += ids.len();
        self.fed.borrow_mut().extend(ids.iter().map(|&t| char::from(t as u8)));
        let mut logits = [0f32; VOCAB];
        logits[(ids[ids.len() - 1] as usize + 1) % VOCAB] = 1.0;
        Ok(Tensor::new(&[logits], &Device::Cpu)?)
    }
    fn fork(&mut self, _: SeqId, _: SeqId) -> Result<()> {
        Err(Error::Unsupported("notes of two sequences".into()))
    }
    fn check_truncate(&self, _: SeqId, _: usize) -> Result<()> {
        Err(Error::Unsupported("notes that end earlier".into()))
    }
    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)
    }
    fn remove(&mut self, _: SeqId) -> bool {
        self.fed.borrow_mut().clear();
        std::mem::take(&mut self.seen) > 0
    }
    fn seqs(&self) -> Vec<SeqId> {
        if self.seen > 0 { vec![0] } else { Vec::new() }
    }
    fn seen(&self, _: SeqId) -> usize {
        self.seen
    }
    fn can_take(&self, _: &Batch) -> bool {
        true
    }
    fn footprint(&self) -> Footprint {
        Footprint { payload: 2 * self.seen, slack: 100, ..Default::default() }
    }
    fn seq_footprint(&self, _: SeqId) -> Footprint {
        self.footprint()
    }
    fn clear(&mut self) {
        self.remove(0);
    }
    fn vocab_size(&self) -> usize {
        VOCAB
    }
    fn context_length(&self) -> Option<usize> {
        None
    }
    fn family(&self) -> &str {
        "notes"
    }
    fn device(&self) -> &Device {
        &Device::Cpu
    }
}

/// A tokenizer with one token per byte.
struct Bytes;

impl Text for Bytes {
    fn encode(&self, text: &str, _: bool) -> std::result::Result<Vec<u32>, Fault> {
        Ok(text.bytes().map(u32::from).collect())
    }
    fn decode(&self, tokens: &[u32]) -> std::result::Result<String, Fault> {
        Ok(tokens.iter().map(|&t| char::from(t as u8)).collect())
    }
    fn chat(&self, conversation: &[String]) -> std::result::Result<Option<String>, Fault> {
        let turn = |(i, said): (usize, &String)| match i % 2 {
            0 => format!("<{said}>"),
            _ => said.clone(),
        };
        Ok(Some(conversation.iter().enumerate().map(turn).collect()))
    }
    fn stop(&self) -> &[u32] {
        &[]
    }
}

/// A compressor that keeps the first half and appends the question.
struct FirstHalf;

impl PromptCompressor for FirstHalf {
    fn compress(&mut self, prompt: Prompt<'_>, rate: Rate) -> Result<Compressed> {
        let mut short =
            Compressed::copy(prompt.text, std::iter::once(0..rate.of(prompt.text.len())))?;
        short.text += &format!("[{}]", prompt.question.unwrap_or("-"));
        Ok(short)
    }
}

fn sample(turns: &[&str], chat: bool) -> Sample {
    Sample {
        id: "0".into(),
        turns: turns.iter().map(|&turn| turn.into()).collect(),
        context: None,
        question: None,
        answers: Vec::new(),
        classes: Vec::new(),
        max_new_tokens: 2,
        chat,
        answer_prefix: None,
        group: None,
    }
}

/// Returns the text fed, the text written, and the bytes held as a share of a dense cache.
fn fed(context: usize, compress: bool, sample: &Sample) -> (String, Vec<String>, f64) {
    let model = Notes::default();
    let fed = model.fed.clone();
    let mut reader = Reader::new(model, Bytes, context).with_dense_bytes_per_token(2.0);
    if compress {
        reader = reader.with_compressor(Box::new(FirstHalf), Rate::new(0.5).unwrap());
    }
    let question = Question { sample, max_new_tokens: 2, stops_at_newline: false };
    let answer = reader.answer(&question).unwrap();
    let share = answer.kv_bytes.unwrap() as f64 / answer.dense_bytes.unwrap() as f64;
    (fed.take(), answer.predictions, share)
}

#[test]
fn turns_are_cut_and_put_in_the_template() {
    let (plain, written, share) = fed(100, false, &sample(&["abc  "], false));
    // The last token written is not fed.
    assert_eq!((plain.as_str(), &written[..], share), ("abcd", &["de".to_owned()][..], 1.0));
    assert_eq!(fed(100, false, &sample(&["abc"], true)).0, "<abc>?");
    assert_eq!(fed(4, false, &sample(&["abcdefgh"], true)).0, "<abgh>?");
    // A second turn continues the conversation: no token is fed twice.
    assert_eq!(fed(100, false, &sample(&["ab", "xy"], true)).0, "<ab>?@<xy>?");
}

#[test]
fn a_compressor_gets_the_whole_or_the_context() {
    let (whole, _, share) = fed(100, true, &sample(&["abcdefgh"], false));
    assert_eq!(whole, "abcd[-]^");
    // A dense cache would hold 8 tokens and the one written; 7 of the 8 were held.
    assert!((share - 8.0 / 9.0).abs() < 1e-9, "{share}");

    let folder = tempfile::tempdir().unwrap();
    let record =
        r#"{"context": "abcdefgh", "input": "Who?", "answers": ["x"], "all_classes": null}"#;
    std::fs::write(folder.path().join("qasper.jsonl"), record).unwrap();
    let task = longbench::task("qasper", folder.path()).unwrap();
    let sample = &task.samples().unwrap().samples[0];
    let (before, after) = sample.turns[0].split_once("abcdefgh").unwrap();
    let kept = |context| fed(context, true, sample).0;
    assert!(kept(5000).starts_with(&format!("<{before}abcd[Who?]{after}>")), "{}", kept(5000));
    // If the truncation reaches into the instruction, the context is unknown and the whole text is
    // compressed.
    let short = kept(100);
    assert!(short.starts_with(&format!("<{}[Who?]>", &before[..50])), "{short}");
}
