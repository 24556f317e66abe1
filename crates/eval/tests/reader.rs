//! Tests the text that a model is fed for a sample: truncated, compressed, formatted with the
//! template.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use candle_core::{Device, Tensor};
use longctx_core::{
    Batch, CausalLm, Compressed, Error, Footprint, Logits, Prompt, PromptCompressor, Rate, Result,
    SeqId,
};
use longctx_eval::{
    Answer, Question, Queue, Reader, Sample, Subject, SubjectError, Task, Text, longbench,
};

const VOCAB: usize = 128;

/// The calls recorded by [`Recorder`].
#[derive(Default)]
struct Fed {
    /// The tokens of each sequence since it began.
    texts: BTreeMap<SeqId, String>,
    /// The sequences of each decode step.
    steps: Vec<Vec<SeqId>>,
}

/// A model that records the tokens that it is fed. The answer to each sequence is the letter after
/// its last token. A batch that contains the token `!` is an error.
#[derive(Default)]
struct Recorder {
    fed: Rc<RefCell<Fed>>,
    seen: BTreeMap<SeqId, usize>,
    /// A sequence whose tokens are an error.
    refused: Option<SeqId>,
}

impl CausalLm for Recorder {
    fn forward(&mut self, batch: &Batch, ids: &[u32], _: Logits) -> Result<Tensor> {
        let mut fed = self.fed.borrow_mut();
        if batch.max_seqlen() == 1 {
            fed.steps.push(batch.seqs().to_vec());
        }
        if self.refused.is_some_and(|seq| batch.seqs().contains(&seq)) {
            return Err(Error::Unsupported("this sequence".into()));
        }
        if ids.contains(&u32::from(b'!')) {
            return Err(Error::Unsupported("exclamations".into()));
        }
        let mut logits = Vec::new();
        for (seq, tokens) in batch.iter() {
            let seen = self.seen.entry(seq).or_default();
            let text = fed.texts.entry(seq).or_default();
            if *seen == 0 {
                text.clear();
            }
            *seen += tokens.len();
            text.extend(ids[tokens.clone()].iter().map(|&t| char::from(t as u8)));
            let mut of_seq = vec![0f32; VOCAB];
            of_seq[(ids[tokens.end - 1] as usize + 1) % VOCAB] = 1.0;
            logits.extend(of_seq);
        }
        Ok(Tensor::from_vec(logits, (batch.seqs().len(), VOCAB), &Device::Cpu)?)
    }
    fn fork(&mut self, _: SeqId, _: SeqId) -> Result<()> {
        Err(Error::Unsupported("a fork of a recorder".into()))
    }
    fn check_truncate(&self, _: SeqId, _: usize) -> Result<()> {
        Err(Error::Unsupported("truncation of a recorder".into()))
    }
    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)
    }
    fn remove(&mut self, seq: SeqId) -> bool {
        self.seen.remove(&seq).is_some()
    }
    fn seqs(&self) -> Vec<SeqId> {
        self.seen.keys().copied().collect()
    }
    fn seen(&self, seq: SeqId) -> usize {
        self.seen.get(&seq).copied().unwrap_or(0)
    }
    fn can_append(&self, _: &Batch) -> bool {
        true
    }
    fn footprint(&self) -> Footprint {
        self.seen.keys().map(|&seq| self.seq_footprint(seq)).sum()
    }
    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        Footprint { payload: 2 * self.seen(seq), slack: 100, ..Default::default() }
    }
    fn clear(&mut self) {
        self.seen.clear();
    }
    fn vocab_size(&self) -> usize {
        VOCAB
    }
    fn context_length(&self) -> Option<usize> {
        None
    }
    fn model_type(&self) -> &str {
        "recorder"
    }
    fn device(&self) -> &Device {
        &Device::Cpu
    }
}

/// A tokenizer with one token per byte.
struct Bytes;

impl Text for Bytes {
    fn encode(&self, text: &str, _: bool) -> std::result::Result<Vec<u32>, SubjectError> {
        Ok(text.bytes().map(u32::from).collect())
    }
    fn decode(&self, tokens: &[u32]) -> std::result::Result<String, SubjectError> {
        Ok(tokens.iter().map(|&t| char::from(t as u8)).collect())
    }
    fn chat(&self, conversation: &[String]) -> std::result::Result<Option<String>, SubjectError> {
        let turn = |(i, said): (usize, &String)| match i % 2 {
            0 => format!("<{said}>"),
            _ => said.clone(),
        };
        Ok(Some(conversation.iter().enumerate().map(turn).collect()))
    }
    fn stop(&self) -> &[u32] {
        &[]
    }
    fn bos(&self) -> Option<&str> {
        None
    }
}

/// A compressor that keeps the first half and appends the question.
struct FirstHalf;

impl PromptCompressor for FirstHalf {
    fn compress(&mut self, prompt: Prompt<'_>, rate: Rate) -> Result<Compressed> {
        let mut short =
            Compressed::copy(prompt.text, std::iter::once(0..rate.apply(prompt.text.len())))?;
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
    let model = Recorder::default();
    let fed = model.fed.clone();
    let mut reader = Reader::new(model, Bytes, context).with_dense_bytes(|tokens| 2 * tokens);
    if compress {
        reader = reader.with_compressor(Box::new(FirstHalf), Rate::new(0.5).unwrap());
    }
    let question = Question { sample, max_new_tokens: 2, stops_at_newline: false, setting: 0 };
    let answer = reader.answer(&question).unwrap();
    let share = answer.kv_bytes.unwrap() as f64 / answer.dense_bytes.unwrap() as f64;
    (fed.take().texts.remove(&0).unwrap(), answer.predictions, share)
}

#[test]
fn turns_are_truncated_and_formatted_with_the_template() {
    let (plain, written, share) = fed(100, false, &sample(&["abc  "], false));
    // The last token written is not fed.
    assert_eq!((plain.as_str(), &written[..], share), ("abcd", &["de".to_owned()][..], 1.0));
    assert_eq!(fed(100, false, &sample(&["abc"], true)).0, "<abc>?");
    assert_eq!(fed(4, false, &sample(&["abcdefgh"], true)).0, "<abgh>?");
    // A second turn continues the conversation: no token is fed twice.
    assert_eq!(fed(100, false, &sample(&["ab", "xy"], true)).0, "<ab>?@<xy>?");
}

#[test]
fn a_compressor_gets_the_prompt_or_its_context() {
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

/// A queue that collects answers in the order in which they come.
struct Samples<'a> {
    questions: Vec<Question<'a>>,
    next: usize,
    answers: Vec<(usize, std::result::Result<Answer, SubjectError>)>,
}

impl<'a> Queue<'a> for Samples<'a> {
    fn next(&mut self) -> Option<(usize, Question<'a>)> {
        let number = self.next;
        self.next += 1;
        Some((number, *self.questions.get(number)?))
    }
    fn answered(&mut self, number: usize, answer: std::result::Result<Answer, SubjectError>) {
        self.answers.push((number, answer));
    }
}

/// A sample's number and answer.
type Ended = (usize, std::result::Result<Answer, String>);

/// Returns the answers of a reader with this batch size, in the order in which they ended, and the
/// sequences of each decode step.
fn answers(batch: usize, questions: &[Question<'_>]) -> (Vec<Ended>, Vec<Vec<SeqId>>) {
    let model = Recorder::default();
    let fed = model.fed.clone();
    let mut reader =
        Reader::new(model, Bytes, 100).with_dense_bytes(|tokens| 2 * tokens).with_batch(batch);
    let mut samples = Samples { questions: questions.into(), next: 0, answers: Vec::new() };
    reader.answer_all(&mut samples);
    let in_words = |(number, answer): (usize, std::result::Result<Answer, SubjectError>)| {
        (number, answer.map_err(|fault| fault.to_string()))
    };
    (samples.answers.into_iter().map(in_words).collect(), fed.take().steps)
}

#[test]
fn batched_answers_equal_single_ones() {
    let samples = [
        sample(&["ab"], true),
        sample(&["xy", "z", "q"], true),
        sample(&["ab"], false),
        // The answer is a tab, then a newline.
        sample(&["a\u{8}"], false),
        sample(&["jk"], false),
    ];
    let most = [3, 2, 1, 5, 4];
    let questions: Vec<_> = samples
        .iter()
        .zip(most)
        .map(|(sample, max_new_tokens)| Question {
            sample,
            max_new_tokens,
            stops_at_newline: true,
            setting: 0,
        })
        .collect();
    let untimed = |(number, answer): &Ended| {
        let a = answer.clone().unwrap();
        let counts = (a.prompt_tokens, a.new_tokens, a.decode_steps, a.kv_bytes, a.dense_bytes);
        (*number, a.predictions, counts)
    };
    let (alone, steps) = answers(1, &questions);
    assert_eq!(steps, vec![[0]; 2 + 3 + 1 + 3]);
    assert!(alone.iter().all(|(_, answer)| answer.as_ref().unwrap().batch.is_none()));
    let (batched, steps) = answers(2, &questions);
    assert!(batched.iter().all(|(_, answer)| answer.as_ref().unwrap().batch == Some(2)));
    // Sample 2 ends with its first token; sample 3 takes the place of sample 0.
    assert_eq!(steps, [&[0, 1][..], &[0, 1], &[1, 0], &[0], &[0], &[0]]);
    assert_eq!(batched.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 2, 1, 3, 4]);
    let mut sorted = batched.clone();
    sorted.sort_by_key(|(number, _)| *number);
    assert_eq!(
        sorted.iter().map(untimed).collect::<Vec<_>>(),
        alone.iter().map(untimed).collect::<Vec<_>>()
    );
}

#[test]
fn an_error_affects_only_its_sample() {
    // The second answer is a space and a "!", which cannot be fed.
    let samples = ["a", "\u{1f}", "c"].map(|text| sample(&[text], false));
    let questions = samples.each_ref().map(|sample| Question {
        sample,
        max_new_tokens: 4,
        stops_at_newline: false,
        setting: 0,
    });
    let (mut answers, _) = answers(3, &questions);
    answers.sort_by_key(|(number, _)| *number);
    let written = |i: usize| answers[i].1.as_ref().map(|answer| answer.predictions[0].as_str());
    assert_eq!((written(0), written(2)), (Ok("bcde"), Ok("defg")));
    assert!(written(1).unwrap_err().contains("exclamations"));
}

/// A format without kernels for the device is an error of the model's first call.
#[test]
fn a_warm_up_has_the_errors_of_every_setting_and_leaves_no_state() {
    for (setting, refused) in [(0, true), (1, true), (2, false)] {
        let model = Recorder { refused: Some(setting), ..Recorder::default() };
        let reader = Reader::new(model, Bytes, 100).with_shared_prefill(2).warm_up();
        assert_eq!(reader.is_err(), refused, "setting {setting}");
    }
    let model = Recorder::default();
    let fed = model.fed.clone();
    let mut reader = Reader::new(model, Bytes, 100).warm_up().ok().unwrap();
    assert_eq!(fed.borrow().texts[&0].len(), 100 + 1);
    let sample = sample(&["ab"], false);
    let question =
        Question { sample: &sample, max_new_tokens: 2, stops_at_newline: false, setting: 0 };
    let answer = reader.answer(&question).unwrap();
    assert_eq!((answer.prompt_tokens, answer.predictions), (2, vec!["cd".to_owned()]));
    assert_eq!(fed.borrow().texts[&0], "abc");
}
