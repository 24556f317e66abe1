//! RULER's prompt templates.

use super::Prompt;

/// The text before and after the context, and the start of the answer.
#[derive(Debug, Clone, Copy)]
pub struct Template {
    pub before: &'static str,
    pub after: &'static str,
    pub prefix: &'static str,
}

pub const NIAH: Template = Template {
    before: "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. \
             I will quiz you about the {type_needle_v} afterwards.\n",
    after: "\nWhat are all the special magic {type_needle_v} for {query} mentioned in the provided text?",
    prefix: " The special magic {type_needle_v} for {query} mentioned in the provided text are",
};

/// [`NIAH`] for a single requested value.
pub const NIAH_ONE: Template = Template {
    before: "A special magic {type_needle_v} is hidden within the following text. Make sure to memorize it. \
             I will quiz you about the {type_needle_v} afterwards.\n",
    after: "\nWhat is the special magic {type_needle_v} for {query} mentioned in the provided text?",
    prefix: " The special magic {type_needle_v} for {query} mentioned in the provided text is",
};

pub const VARIABLES: Template = Template {
    before: "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    after: "\nQuestion: Find all variables that are assigned the value {query} in the text above.",
    prefix: " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are \
             assigned the value {query}, they are: ",
};

pub const COMMON_WORDS: Template = Template {
    before: "Below is a numbered list of words. In these words, some appear more often than others. \
             Memorize the ones that appear most often.\n",
    after: "\nQuestion: What are the 10 most common words in the above list?",
    prefix: " Answer: The top 10 words that appear most often in the list are:",
};

pub const FREQUENT_WORDS: Template = Template {
    before: "Read the following coded text and track the frequency of each coded word. \
             Find the three most frequently appeared coded words. ",
    after: "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. \
            What are the three most frequently appeared words in the above coded text?",
    prefix: " Answer: According to the coded text above, the three most frequently appeared words are:",
};

pub const QA: Template = Template {
    before: "Answer the question based on the given documents. Only give me the answer and do not output any other \
             words.\n\nThe following are given documents.\n\n",
    after: "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any \
            other words.\n\nQuestion: {query}",
    prefix: " Answer:",
};

impl Template {
    /// Fills in the fields, each a name and its value, in order. Braces in the context are not
    /// replaced.
    pub fn fill(&self, context: &str, fields: &[(&str, &str)], answers: Vec<String>) -> Prompt {
        let fill = |text: &str| {
            fields.iter().fold(text.to_owned(), |text, (name, value)| {
                text.replace(&format!("{{{name}}}"), value)
            })
        };
        let before = fill(self.before);
        let place = before.len()..before.len() + context.len();
        let question = fields.iter().find(|(name, _)| *name == "query").map(|(_, query)| *query);
        Prompt {
            input: before + context + &fill(self.after),
            prefix: fill(self.prefix),
            context: place,
            question: question.map_or_else(|| fill(self.after).trim().to_owned(), str::to_owned),
            answers,
        }
    }
}
